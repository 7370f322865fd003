// Tensors as the structures of kernels/rows.h, with checks. The Python functions give better
// messages; these checks prevent a direct call of the operators from reading out of bounds.
#pragma once

#include <optional>
#include <vector>

#include "kernels/rows.h"
#include "tensors.h"

namespace dimr_fast {

inline std::vector<int64_t> sizes_of(const Tensor& x) {
    return {x.sizes().begin(), x.sizes().end()};
}

// `[B, …, D]` as rows: in place if its strides allow it, otherwise of a contiguous copy.
class Features {
  public:
    explicit Features(const Tensor& x, const char* name) : tensor_(x) {
        STD_TORCH_CHECK(x.dim() >= 2, name, ": expected [B, …, D], got ", x.dim(), " dimensions");
        STD_TORCH_CHECK(x.is_cpu(), name, ": not on the CPU");
        images = x.size(0);
        width = x.size(-1);
        rows = 1;
        for (int64_t i = 1; i + 1 < x.dim(); ++i) rows *= x.size(i);
        if (!in_place()) tensor_ = torch::stable::contiguous(x);
        view = {const_cast<void*>(tensor_.const_data_ptr()), dtype_of(x, name), tensor_.stride(0),
                row_stride()};
    }

    bool empty() const { return images * rows * width == 0; }

    void check_like(const Features& other, const char* name) const {
        const Tensor &a = tensor_, &b = other.tensor_;
        bool same = a.dim() == b.dim();
        for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == b.size(i);
        STD_TORCH_CHECK(same, name, ": its shape is not that of x");
    }

    int64_t images, rows, width;
    Rows view;

  private:
    // The stride of the innermost axis with more than one row between the first and the last axis.
    int64_t row_stride() const {
        for (int64_t i = tensor_.dim() - 2; i > 0; --i)
            if (tensor_.size(i) != 1) return tensor_.stride(i);
        return width;
    }

    bool in_place() const {
        if (width > 1 && tensor_.stride(-1) != 1) return false;
        int64_t expected = row_stride();
        for (int64_t i = tensor_.dim() - 2; i > 0; --i) {
            if (tensor_.size(i) != 1 && tensor_.stride(i) != expected) return false;
            expected *= tensor_.size(i);
        }
        return true;
    }

    Tensor tensor_;
};

// Returns the dtype of a sum.
inline ScalarType promoted(ScalarType a, ScalarType b) { return a == b ? a : ScalarType::Float; }

// Returns a contiguous output tensor as rows.
inline Rows rows_in(const Tensor& out, const Features& like, int64_t width) {
    return {out.mutable_data_ptr(), dtype_of(out, "output"), like.rows * width, width};
}

// `[T, D]` in fp32, where T is the number of images or 1.
class TimeValues {
  public:
    TimeValues(const Tensor& value, int64_t images, int64_t width, const char* name)
        : times(value.dim() == 2 ? value.size(0) : 0), tensor_(value) {
        STD_TORCH_CHECK(
            value.dim() == 2 && value.size(1) == width && (times == 1 || times == images), name,
            ": expected [1 or ", images, ", ", width, "]");
        STD_TORCH_CHECK(value.is_cpu(), name, ": not on the CPU");
        const DType dtype = dtype_of(value, name);
        if (width > 1 && value.stride(1) != 1) tensor_ = torch::stable::contiguous(value);
        view = {static_cast<const float*>(tensor_.const_data_ptr()),
                times == 1 ? 0 : tensor_.stride(0)};
        if (dtype == DType::FLOAT32) return;
        wide_.emplace(std::initializer_list<int64_t>{times, width, sizeof(float)});
        float* const to = static_cast<float*>(wide_->data());
        const char* from = static_cast<const char*>(tensor_.const_data_ptr());
        for (int64_t t = 0; t < times; ++t) DIMR_FAST_CHOOSE(widen)
        (dtype, from + t * tensor_.stride(0) * tensor_.element_size(), to + t * width, width);
        view = {to, times == 1 ? 0 : width};
    }

    Values view;
    int64_t times;

  private:
    Tensor tensor_;
    std::optional<Scratch> wide_;
};

inline void check_statistic(const Tensor& value, const Features& x, const char* name) {
    STD_TORCH_CHECK(value.dim() == 2 && value.size(0) == x.images && value.size(1) == x.rows &&
                        value.is_contiguous() && value.is_cpu() &&
                        value.scalar_type() == ScalarType::Float,
                    name, ": expected float32 [", x.images, ", ", x.rows, "], contiguous");
}

inline Chunks chunks_of(const Features& x, int64_t count) {
    const int64_t chunks = (x.rows + count - 1) / count;
    // Make all chunks about equally long.
    return {x.images, x.rows, (x.rows + chunks - 1) / chunks, chunks};
}

// Returns chunks of rows that stay in the L1 cache between two passes.
inline Chunks chunks_in_cache(const Features& x, int64_t width) {
    constexpr int64_t COLUMNS = 2048;
    return chunks_of(x, std::max<int64_t>(1, COLUMNS / width));
}

// Returns chunks of rows that have a partial sum each: enough chunks for all threads, and rows
// enough per chunk that the traffic of the sums is small.
inline Chunks chunks_to_sum(const Features& x) {
    return chunks_of(x, std::clamp<int64_t>(x.images * x.rows / 128, 16, 256));
}

// Runs `function(begin, end)` over the chunks of rows.
template <typename Function>
void each_chunk(const Chunks& p, int64_t width, const Function& function) {
    constexpr int64_t BYTES = 16;  // that all passes move per column
    parallel(p.images * p.chunks, p.count * width * BYTES, function);
}

inline void sum_partials(const float* partial, float* total, int64_t times, int64_t count,
                         int64_t width) {
    const int64_t blocks = (width + SUM_COLUMNS - 1) / SUM_COLUMNS;
    parallel(times * blocks, count * SUM_COLUMNS, [&](int64_t begin, int64_t end) {
        DIMR_FAST_CHOOSE(sum_partials)(partial, total, count, width, begin, end);
    });
}

}  // namespace dimr_fast
