// Features as rows of images, for kernels over the last axis.
#pragma once

#include <cstdint>

#include "../dtypes.h"
#include "../instruction_set.h"

namespace dimr_fast {

// [images, rows, width]; neighbouring columns are neighbours in memory.
struct Rows {
    void* data;  // null where there are none
    DType dtype;
    int64_t image_stride, row_stride;
};

// [times, width] in fp32; the stride is 0 where all images share one time.
struct Values {
    const float* data;
    int64_t image_stride;
};

// The rows of a task: `count` of them, fewer at an image's end; `chunks` tasks an image.
struct Chunks {
    int64_t images, rows, count, chunks;
};

// Columns of a task of `sum_partials`.
constexpr int64_t SUM_COLUMNS = 64;

// total[t, c] = Σ_i partial[t, i, c] over `count` in order; a task is SUM_COLUMNS columns of a t.
DIMR_FAST_DECLARE(void sum_partials(const float* partial, float* total, int64_t count,
                                    int64_t width, int64_t begin, int64_t end))
// One row to fp32.
DIMR_FAST_DECLARE(void widen(DType dtype, const void* from, float* to, int64_t width))

}  // namespace dimr_fast
