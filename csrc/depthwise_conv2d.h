// Checks of the arguments of dimr_fast::depthwise_conv2d_fwd and _bwd, for every implementation.
// The Python function gives better messages; these prevent a direct call of the operators from
// reading out of bounds.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace dimr_fast {

struct DepthwiseConv2dShape {
    int64_t batch, height, width, channels, kernel;

    int64_t numel() const { return batch * height * width * channels; }
};

inline void check_on_device_of(const torch::stable::Tensor& x, const torch::stable::Tensor& value,
                               const char* name) {
    STD_TORCH_CHECK(
        value.is_cuda() == x.is_cuda() && value.get_device_index() == x.get_device_index(), name,
        ": not on the device of x");
}

inline void check_last_stride(const torch::stable::Tensor& value, const char* name) {
    STD_TORCH_CHECK(value.stride(3) == 1 || value.size(3) == 1 || value.numel() == 0, name,
                    ": expected a last stride of 1");
}

inline DepthwiseConv2dShape check_depthwise_conv2d(
    const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
    const std::optional<torch::stable::Tensor>& bias) {
    STD_TORCH_CHECK(x.dim() == 4, "x: expected [B, H, W, D], got ", x.dim(), " dimensions");
    check_last_stride(x, "x");
    STD_TORCH_CHECK(weight.dim() == 4, "weight: expected [D, 1, k, k], got ", weight.dim(),
                    " dimensions");
    STD_TORCH_CHECK(weight.is_contiguous(), "weight: expected a contiguous tensor");
    const DepthwiseConv2dShape shape{x.size(0), x.size(1), x.size(2), x.size(3), weight.size(2)};
    STD_TORCH_CHECK(weight.size(0) == shape.channels && weight.size(1) == 1 &&
                        weight.size(3) == shape.kernel && shape.kernel % 2 == 1,
                    "weight: expected [", shape.channels, ", 1, k, k] with odd k, got [",
                    weight.size(0), ", ", weight.size(1), ", ", weight.size(2), ", ",
                    weight.size(3), "]");
    check_on_device_of(x, weight, "weight");
    if (bias) {
        STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == shape.channels, "bias: expected [",
                        shape.channels, "]");
        STD_TORCH_CHECK(bias->is_contiguous(), "bias: expected a contiguous tensor");
        STD_TORCH_CHECK(bias->scalar_type() == weight.scalar_type(),
                        "bias: its dtype is not that of weight");
        check_on_device_of(x, *bias, "bias");
    }
    return shape;
}

inline DepthwiseConv2dShape check_depthwise_conv2d_grad(const torch::stable::Tensor& dy,
                                                        const torch::stable::Tensor& x,
                                                        const torch::stable::Tensor& weight) {
    const DepthwiseConv2dShape shape = check_depthwise_conv2d(x, weight, std::nullopt);
    STD_TORCH_CHECK(dy.dim() == 4 && dy.size(0) == shape.batch && dy.size(1) == shape.height &&
                        dy.size(2) == shape.width && dy.size(3) == shape.channels,
                    "dy: its shape is not that of x");
    check_last_stride(dy, "dy");
    STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy: its dtype is not that of x");
    check_on_device_of(x, dy, "dy");
    return shape;
}

}  // namespace dimr_fast
