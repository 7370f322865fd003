// Shared by all operators on the CPU: dtypes, scratch memory, threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>

#include "dtypes.h"

namespace dimr_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor, const char* name) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return DType::FLOAT32;
        case ScalarType::BFloat16:
            return DType::BFLOAT16;
        case ScalarType::Half:
            return DType::FLOAT16;
        default:
            STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
    }
}

// Memory for the duration of a call, aligned to a cache line; its size in bytes is the product of
// `factors`. An expanded batch can have more images than memory: a product that overflows is an
// error.
class Scratch {
  public:
    explicit Scratch(std::initializer_list<int64_t> factors) {
        int64_t bytes = 1;
        for (const int64_t factor : factors)
            STD_TORCH_CHECK(!__builtin_mul_overflow(bytes, factor, &bytes) && bytes < LIMIT,
                            "x: what its sums need does not fit in memory");
        data_ = std::aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT) / ALIGNMENT * ALIGNMENT);
        STD_TORCH_CHECK(data_ != nullptr, "can't allocate memory: ", bytes, " bytes");
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    void* data() const { return data_; }

  private:
    static constexpr int64_t ALIGNMENT = 64, LIMIT = int64_t{1} << 50;
    void* data_;
};

// Runs `function(begin, end)` over `tasks` of about `cost` vector operations each. A thread gets at
// least about ten microseconds of work.
template <typename Function>
void parallel(int64_t tasks, int64_t cost, const Function& function) {
    constexpr int64_t WORTH_A_THREAD = 1 << 15;
    const int64_t grain = std::max<int64_t>(1, WORTH_A_THREAD / std::max<int64_t>(1, cost));
    torch::stable::parallel_for(0, tasks, grain, function);
}

}  // namespace dimr_fast
