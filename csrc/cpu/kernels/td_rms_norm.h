#pragma once

#include "rows.h"

namespace dimr_fast {

struct TDRMSNorm {
    Chunks chunks;
    int64_t width;
    Rows x, residual;
    Rows sum;  // x + residual; x itself without a residual
    Rows y;
    Values scale;
    float* rms;  // [images, rows]
};

struct TDRMSNormGrad {
    Chunks chunks;
    int64_t width;
    Rows dy, dsum, x, dx;  // x is the sum that was normed; dsum (may be null) and dx have its dtype
    Rows y;                // the result again, in the dtype of dy, or null
    Values scale;
    const float* rms;  // [images, rows]
    float* partial;    // [images, chunks, width], of the scale's gradient
};

DIMR_FAST_DECLARE(void td_rms_norm(const TDRMSNorm& p, int64_t begin, int64_t end))
DIMR_FAST_DECLARE(void td_rms_norm_grad(const TDRMSNormGrad& p, int64_t begin, int64_t end))

}  // namespace dimr_fast
