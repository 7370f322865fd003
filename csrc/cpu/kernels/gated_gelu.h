#pragma once

#include "rows.h"

namespace dimr_fast {

struct GatedGELU {
    Chunks chunks;
    int64_t hidden;
    Rows x;  // [images, rows, 2 * hidden]
    Rows y;  // [images, rows, hidden]
};

struct GatedGELUGrad {
    Chunks chunks;
    int64_t hidden;
    Rows dy, y;  // [images, rows, hidden]; y is the result again, or null
    Rows x, dx;  // [images, rows, 2 * hidden]
};

DIMR_FAST_DECLARE(void gated_gelu(const GatedGELU& p, int64_t begin, int64_t end))
DIMR_FAST_DECLARE(void gated_gelu_grad(const GatedGELUGrad& p, int64_t begin, int64_t end))

}  // namespace dimr_fast
