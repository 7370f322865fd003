#pragma once

#include "rows.h"

namespace dimr_fast {

// A row is the concatenation of `pieces` of `piece_width` columns, which are separate in memory.
struct TDLayerNorm {
    Chunks chunks;
    int64_t pieces, piece_width;
    const Rows* x;
    Rows residual;    // only with one piece
    const Rows* sum;  // x + residual; x itself without a residual
    Rows y;
    Values weight, bias;
    float *mean, *rstd;  // [images, rows]
};

struct TDLayerNormGrad {
    Chunks chunks;
    int64_t pieces, piece_width;
    Rows dy, dsum, y;  // dsum (only with one piece) and y may be null
    const Rows* x;
    void* dx;  // [pieces, images, rows, piece_width] in the dtype of x and dsum, or null
    Values weight, bias;
    const float *mean, *rstd;  // [images, rows]
    float* partial;            // [2, images, chunks, width], of weight and bias
};

DIMR_FAST_DECLARE(void td_layer_norm(const TDLayerNorm& p, int64_t begin, int64_t end))
DIMR_FAST_DECLARE(void td_layer_norm_grad(const TDLayerNormGrad& p, int64_t begin, int64_t end))

}  // namespace dimr_fast
