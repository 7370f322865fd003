// The dtypes of kernels, without torch.
#pragma once

#include <cstdint>

namespace dimr_fast {

struct BFloat16 {
    uint16_t bits;
};

struct Half {
    uint16_t bits;
};

enum class DType { FLOAT32, BFLOAT16, FLOAT16 };

// Calls `function` with a null pointer of the C++ type of `dtype`.
template <typename Function>
inline __attribute__((always_inline)) void with_type(DType dtype, Function function) {
    switch (dtype) {
        case DType::FLOAT32:
            return function(static_cast<float*>(nullptr));
        case DType::BFLOAT16:
            return function(static_cast<BFloat16*>(nullptr));
        case DType::FLOAT16:
            return function(static_cast<Half*>(nullptr));
    }
}

}  // namespace dimr_fast
