// Features as rows of images, for kernels over the last axis.
#pragma once

#include <cstdint>

#include "../dtypes.h"
#include "../instruction_set.h"

namespace dimr_fast {

// [images, rows, width]; the last axis is contiguous.
struct Rows {
    void* data;  // null if there are no rows
    DType dtype;
    int64_t image_stride, row_stride;
};

// [times, width] in fp32; the stride is 0 if all images share one time.
struct Values {
    const float* data;
    int64_t image_stride;
};

// How rows are split into tasks: `count` rows each, fewer at an image's end; `chunks` per image.
struct Chunks {
    int64_t images, rows, count, chunks;
};

// The number of columns of a task of `sum_partials`.
constexpr int64_t SUM_COLUMNS = 64;

// total[t, c] = Σ_i partial[t, i, c], i < count, in order; a task is SUM_COLUMNS columns of one t.
DIMR_FAST_DECLARE(void sum_partials(const float* partial, float* total, int64_t count,
                                    int64_t width, int64_t begin, int64_t end))
// out = a + b, all of one dtype.
DIMR_FAST_DECLARE(void add(const Rows& a, const Rows& b, const Rows& out, const Chunks& chunks,
                           int64_t width, int64_t begin, int64_t end))
// Converts one row to fp32.
DIMR_FAST_DECLARE(void widen(DType dtype, const void* from, float* to, int64_t width))

}  // namespace dimr_fast
