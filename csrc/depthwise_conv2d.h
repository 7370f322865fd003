// What both implementations of dimr_fast::depthwise_conv2d_fwd ask of their arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace dimr_fast {

struct DepthwiseConv2dShape {
    int64_t batch, height, width, channels, kernel;

    int64_t numel() const { return batch * height * width * channels; }
};

// The Python function checks with better messages; this keeps a direct call of the operator from
// reading out of bounds.
inline DepthwiseConv2dShape check_depthwise_conv2d(
    const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
    const std::optional<torch::stable::Tensor>& bias) {
    STD_TORCH_CHECK(x.dim() == 4, "x: expected [B, H, W, D], got ", x.dim(), " dimensions");
    STD_TORCH_CHECK(x.is_contiguous(), "x: expected a contiguous tensor");
    STD_TORCH_CHECK(weight.dim() == 4, "weight: expected [D, 1, k, k], got ", weight.dim(),
                    " dimensions");
    STD_TORCH_CHECK(weight.is_contiguous(), "weight: expected a contiguous tensor");
    const DepthwiseConv2dShape shape{x.size(0), x.size(1), x.size(2), x.size(3), weight.size(2)};
    STD_TORCH_CHECK(weight.size(0) == shape.channels && weight.size(1) == 1 &&
                        weight.size(3) == shape.kernel && shape.kernel % 2 == 1,
                    "weight: expected [", shape.channels, ", 1, k, k] with odd k, got [",
                    weight.size(0), ", ", weight.size(1), ", ", weight.size(2), ", ",
                    weight.size(3), "]");
    STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight: its dtype is not that of x");
    STD_TORCH_CHECK(
        weight.is_cuda() == x.is_cuda() && weight.get_device_index() == x.get_device_index(),
        "weight: not on the device of x");
    if (bias) {
        STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == shape.channels, "bias: expected [",
                        shape.channels, "]");
        STD_TORCH_CHECK(bias->is_contiguous(), "bias: expected a contiguous tensor");
        STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type(), "bias: its dtype is not that of x");
        STD_TORCH_CHECK(
            bias->is_cuda() == x.is_cuda() && bias->get_device_index() == x.get_device_index(),
            "bias: not on the device of x");
    }
    return shape;
}

}  // namespace dimr_fast
