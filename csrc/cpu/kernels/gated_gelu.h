#pragma once

#include "rows.h"

namespace dimr_fast {

struct GatedGELU {
    Chunks chunks;
    int64_t hidden;
    Rows x;   // [images, rows, 2 * hidden]
    Rows y;   // [images, rows, hidden]; for the gradient: dy
    Rows dx;  // as x; for the gradient only
};

DIMR_FAST_DECLARE(void gated_gelu(const GatedGELU& p, int64_t begin, int64_t end))
DIMR_FAST_DECLARE(void gated_gelu_grad(const GatedGELU& p, int64_t begin, int64_t end))

}  // namespace dimr_fast
