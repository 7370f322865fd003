// What operators on the CPU share: dtypes, scratch memory, threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <new>

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

// Memory of one thread for the time of a call, aligned to a cache line.
class Scratch {
  public:
    explicit Scratch(int64_t bytes) : data_(::operator new(bytes, std::align_val_t{64})) {}
    ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    void* data() const { return data_; }

  private:
    void* data_;
};

// Runs `function(begin, end)` over `tasks` of about `cost` vector operations each: a thread
// is not woken for less than some ten microseconds of work.
template <typename Function>
void parallel(int64_t tasks, int64_t cost, const Function& function) {
    constexpr int64_t WORTH_A_THREAD = 1 << 15;
    const int64_t grain = std::max<int64_t>(1, WORTH_A_THREAD / std::max<int64_t>(1, cost));
    torch::stable::parallel_for(0, tasks, grain, function);
}

}  // namespace dimr_fast
