// What operators on the CPU share: dtypes, scratch memory, threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <new>

#include "dtypes.h"
#include "rows.h"

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

// The dtype that both convert to, among those of `dtype_of`.
inline ScalarType promoted(ScalarType a, ScalarType b) { return a == b ? a : ScalarType::Float; }

// Whether the axes from `first` on, all but the last, step through memory as one would.
inline bool steps_evenly(const Tensor& tensor, int64_t first) {
    int64_t step = -1;
    for (int64_t axis = tensor.dim() - 2; axis >= first; --axis) {
        if (tensor.size(axis) == 1) continue;
        if (step >= 0 && tensor.stride(axis) != step) return false;
        step = tensor.stride(axis) * tensor.size(axis);
    }
    return true;
}

// `tensor` `[B, …, D]` or, where `rows` could not tell where its rows lie, a copy of it.
inline Tensor with_rows(const Tensor& tensor) {
    const int64_t last = tensor.dim() - 1;
    const bool adjacent = tensor.stride(last) == 1 || tensor.size(last) == 1;
    const bool even = steps_evenly(tensor, tensor.dim() > 2 ? 1 : 0);
    return adjacent && even ? tensor : torch::stable::contiguous(tensor);
}

// The rows of `with_rows(tensor)`; without a batch they are those of one image.
inline Rows rows(const Tensor& tensor, const char* name) {
    const int64_t last = tensor.dim() - 1, first = tensor.dim() > 2 ? 1 : 0;
    Rows rows{};
    rows.data = const_cast<void*>(tensor.const_data_ptr());
    rows.dtype = dtype_of(tensor, name);
    rows.width = tensor.size(last);
    rows.images = first == 1 ? tensor.size(0) : 1;
    rows.image_stride = first == 1 ? tensor.stride(0) : 0;
    rows.count = 1;
    for (int64_t axis = last - 1; axis >= first; --axis) {
        if (rows.count == 1) rows.row_stride = tensor.stride(axis);
        rows.count *= tensor.size(axis);
    }
    return rows;
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

// Runs `function(begin, end)` over `tasks` of about `cost` multiply-adds (or bytes) each: a thread
// is not woken for less than some ten microseconds of work.
template <typename Function>
void parallel(int64_t tasks, int64_t cost, const Function& function) {
    constexpr int64_t WORTH_A_THREAD = 1 << 18;
    const int64_t grain = std::max<int64_t>(1, WORTH_A_THREAD / std::max<int64_t>(1, cost));
    torch::stable::parallel_for(0, tasks, grain, function);
}

}  // namespace dimr_fast
