#pragma once

#include "rows.h"

namespace dimr_fast {

// The gradient of a linear layer's weight and bias: Σ_m dy[m]ᵀ · x[m] and Σ_m dy[m].
struct WeightGradient {
    int64_t rows, width, height;  // of x: [rows, width]; of dy: [rows, height]
    const BFloat16 *dy, *x;
    int64_t dy_stride, x_stride;
    int64_t chunks, chunk;  // of the rows: their number, and the rows of each
    int64_t blocks;         // of the columns of dy
    // [chunks, blocks, WEIGHT_GRADIENT_BLOCK, padded width]: sums over the rows of a chunk
    float* partial;
    float* bias_partial;  // [chunks, blocks, WEIGHT_GRADIENT_BLOCK]; null if not needed
    float *dweight, *dbias;
    int64_t dweight_stride;
};

// Columns of dy in a task.
constexpr int64_t WEIGHT_GRADIENT_BLOCK = 96;

// The width of a row of `partial`: the vectors of x.
DIMR_FAST_DECLARE(int64_t padded_width(int64_t width))
// Bytes of one thread's scratch, which is aligned to 64.
DIMR_FAST_DECLARE(int64_t weight_gradient_scratch(const WeightGradient& p))
// A task is one block of columns of one chunk of rows, blocks fastest.
DIMR_FAST_DECLARE(void weight_gradient(const WeightGradient& p, int64_t begin, int64_t end,
                                       void* scratch))
// Adds the sums of the chunks in their order; a task is one row of the result.
DIMR_FAST_DECLARE(void weight_gradient_sum(const WeightGradient& p, int64_t begin, int64_t end))

}  // namespace dimr_fast
