// The forward operators, for C++ code that runs several of them in one call.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace dimr_fast {

// Returns (sum or empty, normed, rms); see td_rms_norm.cpp.
std::tuple<Tensor, Tensor, Tensor> td_rms_norm_fwd(const Tensor& x,
                                                   const std::optional<Tensor>& residual,
                                                   const Tensor& scale, ScalarType dtype);

// Returns (sum or empty, normed, mean, 1 / standard deviation); see td_layer_norm.cpp.
std::tuple<Tensor, Tensor, Tensor, Tensor> td_layer_norm_fwd(const Tensor& weight,
                                                             const Tensor& bias,
                                                             const std::vector<Tensor>& tensors,
                                                             const std::optional<Tensor>& residual,
                                                             ScalarType dtype);

// Returns (attention, statistics); see attention.cpp.
std::tuple<Tensor, Tensor> attention_fwd(const Tensor& qkv, int64_t heads);

// Returns (out, mean, 1 / standard deviation); see upsample_add.cpp.
std::tuple<Tensor, Tensor, Tensor> upsample_add_fwd(const Tensor& x, const Tensor& projected,
                                                    const Tensor& weight, const Tensor& bias);

Tensor gated_gelu_fwd(const Tensor& x);

Tensor depthwise_conv2d_fwd(const Tensor& x, const Tensor& weight,
                            const std::optional<Tensor>& bias, bool residual);

}  // namespace dimr_fast
