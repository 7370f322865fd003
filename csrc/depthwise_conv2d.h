// What the implementations of dimr_fast::depthwise_conv2d_fwd and _bwd ask of their arguments. The
// Python function checks with better messages; this keeps a direct call of an operator from
// reading out of bounds.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace dimr_fast {

struct DepthwiseConv2dShape {
    int64_t batch, height, width, channels, kernel;

    int64_t numel() const { return batch * height * width * channels; }
};

namespace check {

using torch::stable::Tensor;

inline void features(const char* name, const Tensor& value) {
    STD_TORCH_CHECK(value.dim() == 4, name, ": expected [B, H, W, D], got ", value.dim(),
                    " dimensions");
    STD_TORCH_CHECK(value.size(3) <= 1 || value.stride(3) == 1, name,
                    ": expected channels that lie together");
}

inline void like(const char* name, const Tensor& value, const Tensor& x) {
    STD_TORCH_CHECK(value.scalar_type() == x.scalar_type(), name, ": its dtype is not that of x");
    STD_TORCH_CHECK(
        value.is_cuda() == x.is_cuda() && value.get_device_index() == x.get_device_index(), name,
        ": not on the device of x");
}

inline DepthwiseConv2dShape shape(const Tensor& x, const Tensor& weight) {
    features("x", x);
    STD_TORCH_CHECK(weight.dim() == 4, "weight: expected [D, 1, k, k], got ", weight.dim(),
                    " dimensions");
    STD_TORCH_CHECK(weight.is_contiguous(), "weight: expected a contiguous tensor");
    const DepthwiseConv2dShape shape{x.size(0), x.size(1), x.size(2), x.size(3), weight.size(2)};
    STD_TORCH_CHECK(weight.size(0) == shape.channels && weight.size(1) == 1 &&
                        weight.size(3) == shape.kernel && shape.kernel % 2 == 1,
                    "weight: expected [", shape.channels, ", 1, k, k] with odd k, got [",
                    weight.size(0), ", ", weight.size(1), ", ", weight.size(2), ", ",
                    weight.size(3), "]");
    like("weight", weight, x);
    return shape;
}

}  // namespace check

// x may have any strides but that of its channels, which is 1.
inline DepthwiseConv2dShape check_depthwise_conv2d_fwd(
    const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
    const std::optional<torch::stable::Tensor>& bias) {
    const DepthwiseConv2dShape shape = check::shape(x, weight);
    if (bias) {
        STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == shape.channels, "bias: expected [",
                        shape.channels, "]");
        STD_TORCH_CHECK(bias->is_contiguous(), "bias: expected a contiguous tensor");
        check::like("bias", *bias, x);
    }
    return shape;
}

// dy and x likewise.
inline DepthwiseConv2dShape check_depthwise_conv2d_bwd(const torch::stable::Tensor& dy,
                                                       const torch::stable::Tensor& x,
                                                       const torch::stable::Tensor& weight) {
    const DepthwiseConv2dShape shape = check::shape(x, weight);
    check::features("dy", dy);
    STD_TORCH_CHECK(dy.size(0) == shape.batch && dy.size(1) == shape.height &&
                        dy.size(2) == shape.width && dy.size(3) == shape.channels,
                    "dy: expected the shape of x");
    check::like("dy", dy, x);
    return shape;
}

// The forward of a contiguous x.
inline DepthwiseConv2dShape check_depthwise_conv2d(
    const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
    const std::optional<torch::stable::Tensor>& bias) {
    STD_TORCH_CHECK(x.is_contiguous(), "x: expected a contiguous tensor");
    return check_depthwise_conv2d_fwd(x, weight, bias);
}

}  // namespace dimr_fast
