// The products of products.h by AMX, which multiplies tiles of 16 rows. For kernels/*.cpp only.
#pragma once

#include "products.h"

#if defined(__AMX_TILE__)
#include <immintrin.h>
#endif

namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET {
namespace {

// Makes the compiler finish all writes to memory: GCC does not know that the instructions on tiles
// read it. `written` is what it could otherwise keep in registers.
inline void finish_writes(const void* written) { asm volatile("" : : "r"(written) : "memory"); }

// A row of a tile has 16 elements. Tiles 0 to 3 hold the sums of 32 rows and 32 columns, 4 and 5
// the factors, 6 and 7 the factors of the last `rest` elements of the summed axis.
class Tiles {
  public:
    static constexpr int64_t SIDE = 16, ROWS = 2 * SIDE;

    explicit Tiles(int64_t elements) {
        const int64_t rest = elements % SIDE;
        struct alignas(64) {
            uint8_t palette = 1, unused[15] = {};
            uint16_t bytes_of_row[16] = {};
            uint8_t rows[16] = {};
        } shape;
        for (int i = 0; i < 6; ++i) shape.bytes_of_row[i] = 64, shape.rows[i] = SIDE;
        if (rest > 0) {
            shape.bytes_of_row[6] = static_cast<uint16_t>(4 * rest), shape.rows[6] = SIDE;
            shape.bytes_of_row[7] = 64, shape.rows[7] = static_cast<uint8_t>(rest);
        }
        finish_writes(&shape);
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

#define DIMR_FAST_ADD_PRODUCT(sum, a, b) \
    if constexpr (P::DEPTH == 4)         \
        _tile_dpbusd(sum, a, b);         \
    else                                 \
        _tile_dpbf16ps(sum, a, b)
#define DIMR_FAST_ADD_PRODUCTS(a, b, k)                                          \
    _tile_loadd(a, left + (k), 4 * left_stride);                                 \
    _tile_loadd(b, right + (k) * right_stride + c, 4 * right_stride);            \
    DIMR_FAST_ADD_PRODUCT(0, a, b);                                              \
    if (two_rows) {                                                              \
        _tile_loadd(a, left + Tiles::SIDE * left_stride + (k), 4 * left_stride); \
        DIMR_FAST_ADD_PRODUCT(2, a, b);                                          \
    }                                                                            \
    if (two_columns) {                                                           \
        _tile_loadd(b, right + (k) * right_stride + c + 16, 4 * right_stride);   \
        if (two_rows) {                                                          \
            DIMR_FAST_ADD_PRODUCT(3, a, b);                                      \
            _tile_loadd(a, left + (k), 4 * left_stride);                         \
        }                                                                        \
        DIMR_FAST_ADD_PRODUCT(1, a, b);                                          \
    }

// The product of `rows` rows, 1 <= rows <= Tiles::ROWS; see `tile` in products.h. Reads and writes
// whole tiles: the rows and columns after the last must exist, and their sums mean nothing. The
// rest of the division of the whole summed axis by the side of a tile is that of `Tiles`.
template <typename P, bool ADDS>
void tile_product(int64_t rows, const typename P::Element* left, int64_t left_stride,
                  const typename P::Element* right, int64_t right_stride, int64_t depth,
                  int64_t columns, float* to, int64_t to_stride) {
    const bool two_rows = rows > Tiles::SIDE;
    const int64_t whole = depth / Tiles::SIDE * Tiles::SIDE;
    finish_writes(left);
    for (int64_t c = 0; c < columns; c += 32) {
        const bool two_columns = columns - c > 16;
        float* const upper = to + c;
        float* const lower = upper + Tiles::SIDE * to_stride;
        if constexpr (ADDS) {
            _tile_loadd(0, upper, 4 * to_stride);
            if (two_columns) _tile_loadd(1, upper + 16, 4 * to_stride);
            if (two_rows) _tile_loadd(2, lower, 4 * to_stride);
            if (two_rows && two_columns) _tile_loadd(3, lower + 16, 4 * to_stride);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t k = 0; k < whole; k += Tiles::SIDE) {
            DIMR_FAST_ADD_PRODUCTS(4, 5, k)
        }
        if (whole < depth) {
            DIMR_FAST_ADD_PRODUCTS(6, 7, whole)
        }
        _tile_stored(0, upper, 4 * to_stride);
        if (two_columns) _tile_stored(1, upper + 16, 4 * to_stride);
        if (two_rows) _tile_stored(2, lower, 4 * to_stride);
        if (two_rows && two_columns) _tile_stored(3, lower + 16, 4 * to_stride);
    }
}

#undef DIMR_FAST_ADD_PRODUCTS
#undef DIMR_FAST_ADD_PRODUCT

}  // namespace
}  // namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET
