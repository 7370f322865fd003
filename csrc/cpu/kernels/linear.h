// Linear layers y = x · Wᵀ + b for inference, with what comes before and after them: a norm of x;
// a residual add, or a gated GELU.
#pragma once

#include "rows.h"

namespace dimr_fast {

// What the products multiply. INT8 multiplies 8-bit integers: a row of x is scaled so that its
// largest magnitude is 127, and so is each row of W.
enum class Factors : int64_t { FLOAT32, BFLOAT16, INT8 };

// The number of columns of y whose weights are stored together.
constexpr int64_t PANEL = 64;
// The most rows that a weight in the L2 cache is used for.
constexpr int64_t LINEAR_ROWS = 64;

// A weight [columns, depth] and a bias, converted and arranged for the products. The layout does
// not depend on the instruction set. With `gated` the layer ends with gelu(a) · b of the two halves
// of its columns; a panel has 32 columns of each half.
struct Weights {
    Factors factors;
    bool gated;
    int64_t depth, columns;
    void* data;

    // Numbers of one 4-byte element.
    int64_t numbers() const {
        return factors == Factors::FLOAT32 ? 1 : factors == Factors::BFLOAT16 ? 2 : 4;
    }
    // Elements of a column.
    int64_t elements() const { return (depth + numbers() - 1) / numbers(); }
    // Columns of y, and how many of them a panel holds.
    int64_t outputs() const { return gated ? columns / 2 : columns; }
    int64_t outputs_of_panel() const { return gated ? PANEL / 2 : PANEL; }
    int64_t panels() const { return (outputs() + outputs_of_panel() - 1) / outputs_of_panel(); }
    // After the panels follow three numbers of each column: bias, scale, and the integer
    // 128 · Σ weights.
    int64_t bytes() const { return 4 * PANEL * panels() * (elements() + 3); }
};

// Where the rows of x come from.
struct LinearInput {
    enum class Norm { NONE, RMS, LAYER };

    const Rows* pieces;  // concatenated along the last axis
    int64_t count, piece_width;
    Norm norm;
    Values scale, shift;  // of the norm; RMS has no shift
};

// Patches [channels, side, side] of images as rows of x.
struct Patches {
    const void* images;
    DType dtype;
    int64_t side, in_width;  // of a patch; patches in the width of an image
    int64_t image_stride, channel_stride, line_stride, column_stride;
};

struct Linear {
    int64_t images, rows;
    LinearInput x;
    Patches patches;  // in place of x, if their images are not null
    Weights weights;
    Rows residual;  // added to y, if not null
    Rows y;
};

#define DIMR_FAST_DECLARE_LINEAR                                                 \
    /* Arranges `weight` [columns, depth] and `bias`, which may be null. */      \
    void pack_linear(const Weights& to, const float* weight, const float* bias); \
    /* The rows that are multiplied at a time. */                                \
    int64_t linear_tile_rows(const Weights& weights);                            \
    /* Bytes of scratch memory, aligned to 64. */                                \
    int64_t linear_scratch(const Weights& weights);                              \
    /* The rows from `begin` to `end` of all images, at most LINEAR_ROWS. */     \
    void linear(const Linear& p, int64_t begin, int64_t end, void* scratch);
DIMR_FAST_DECLARE(DIMR_FAST_DECLARE_LINEAR)
#if defined(__x86_64__)
namespace amx {
DIMR_FAST_DECLARE_LINEAR
}
#endif

}  // namespace dimr_fast
