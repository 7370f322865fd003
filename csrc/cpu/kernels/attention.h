#pragma once

#include "rows.h"

namespace dimr_fast {

struct Attention {
    int64_t images, tokens, heads, head_dim;
    Rows qkv;  // [images, tokens, 3 * heads * head_dim]
    Rows y;    // [images, tokens, heads * head_dim], in the dtype of qkv
    // [images, heads, 2, tokens]: top = max s and 1 / Σ 2^(s - top), with scores s in units of
    // ln 2.
    float* statistics;
    int64_t splits;  // tasks of one head; each has an equal share of the queries
};

// Bytes of one thread's scratch, which is aligned to 64.
DIMR_FAST_DECLARE(int64_t attention_scratch(const Attention& p))
// A task is one split of the queries of one head of one image, splits fastest.
DIMR_FAST_DECLARE(void attention(const Attention& p, int64_t begin, int64_t end, void* scratch))

}  // namespace dimr_fast
