// Linear layers by PyTorch's own operators, called from C++.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "tensors.h"

namespace dimr_fast {

// x · Wᵀ + b. A weight in oneDNN's layout (bf16) goes to oneDNN, any other to `aten::linear`.
inline Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     bool packed) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    if (packed) {
        std::array<StableIValue, 6> stack{from(x),
                                          from(weight),
                                          from(bias),
                                          from(std::string("none")),
                                          from(std::vector<int64_t>{}),
                                          from(std::optional<std::string>(""))};
        TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack.data(),
                                                     TORCH_ABI_VERSION));
        return to<Tensor>(stack[0]);
    }
    std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
    return to<Tensor>(stack[0]);
}

}  // namespace dimr_fast
