// Products of a few rows of a left factor and vectors of columns of a right factor, kept in
// registers. For kernels/*.cpp only.
//
// Both factors consist of 4-byte elements of DEPTH adjacent numbers along the summed axis: fp32
// numbers, pairs of bf16 numbers or quadruples of 8-bit integers. An element of the left factor is
// broadcast; elements of the right factor of adjacent columns are adjacent. Bf16 products are
// summed in fp32, those of integers exactly in int32.
#pragma once

#include "../vector.h"

namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET {
namespace {

// The rows and vectors of a tile. Sums, factors and one broadcast element fit in the registers: 32
// with AVX-512, 16 otherwise.
#if defined(__AVX512F__)
constexpr int ROWS = 6, COLUMNS = 4;
#else
constexpr int ROWS = 4, COLUMNS = 2;
#endif

typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

struct Single {
    using Element = float;
    using Sum = Vector;
    using Factor = Vector;
    static constexpr int64_t DEPTH = 1;
    static Factor broadcast_of(const Element* a) { return broadcast(*a); }
    static Factor factor(const Element* b) { return load(b); }
    static Sum add_product(Sum sum, Factor a, Factor b) { return sum + a * b; }
};

struct Pairs {
    using Element = uint32_t;
    using Sum = Vector;
    static constexpr int64_t DEPTH = 2;
#if defined(__AVX512BF16__)
    using Factor = __m512bh;
    static Factor broadcast_of(const Element* a) {
        return (__m512bh)_mm512_set1_epi32(static_cast<int>(*a));
    }
    static Factor factor(const Element* b) { return (__m512bh)_mm512_loadu_si512(b); }
    static Sum add_product(Sum sum, Factor a, Factor b) {
        return (Sum)_mm512_dpbf16_ps((__m512)sum, a, b);
    }
#else
    struct Factor {
        Vector even, odd;
    };
    static Factor halves(Bits pairs) {
        return {bits_as<Vector>(pairs << 16), bits_as<Vector>(pairs & 0xffff0000u)};
    }
    static Factor broadcast_of(const Element* a) { return halves(Bits{} + *a); }
    static Factor factor(const Element* b) { return halves(read<Bits>(b)); }
    static Sum add_product(Sum sum, Factor a, Factor b) {
        return sum + a.even * b.even + a.odd * b.odd;
    }
#endif
};

// The left numbers are unsigned, the right ones signed.
struct Quadruples {
    using Element = uint32_t;
    using Sum = Integers;
    static constexpr int64_t DEPTH = 4;
#if defined(__AVX512VNNI__)
    using Factor = __m512i;
    static Factor broadcast_of(const Element* a) { return _mm512_set1_epi32(static_cast<int>(*a)); }
    static Factor factor(const Element* b) { return _mm512_loadu_si512(b); }
    static Sum add_product(Sum sum, Factor a, Factor b) {
        return (Sum)_mm512_dpbusd_epi32((__m512i)sum, a, b);
    }
#else
    typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));
    struct Factor {
        Shorts even, odd;
    };
    static Factor broadcast_of(const Element* a) {
        const Bits element = Bits{} + *a;
        return {(Shorts)(element & 0x00ff00ffu), (Shorts)((element >> 8) & 0x00ff00ffu)};
    }
    static Factor factor(const Element* b) {
        const Shorts element = read<Shorts>(b);
        return {(element << 8) >> 8, element >> 8};
    }
    // Sums of products of two adjacent numbers.
    static Sum multiplied(Shorts a, Shorts b) {
#if defined(__AVX512F__)
        return (Sum)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
        return (Sum)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
        const Sum x = (Sum)a, y = (Sum)b;
        return ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
    }
    static Sum add_product(Sum sum, Factor a, Factor b) {
        return sum + multiplied(a.even, b.even) + multiplied(a.odd, b.odd);
    }
#endif
};

// to[r, c] = Σ_k left[r, k] · right[k, c] for R rows and C vectors of columns; with `ADDS`, this
// sum is added to `to`. Strides are in elements.
template <typename P, int R, int C, bool ADDS>
inline void tile(const typename P::Element* left, int64_t left_stride,
                 const typename P::Element* right, int64_t right_stride, int64_t depth, float* to,
                 int64_t to_stride) {
    typename P::Sum sums[R][C] = {};
    for (int64_t k = 0; k < depth; ++k) {
        typename P::Factor factors[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) factors[c] = P::factor(right + k * right_stride + c * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const typename P::Factor a = P::broadcast_of(left + r * left_stride + k);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) sums[r][c] = P::add_product(sums[r][c], a, factors[c]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            float* const place = to + r * to_stride + c * LANES;
            if constexpr (ADDS) sums[r][c] += read<typename P::Sum>(place);
            write(place, sums[r][c]);
        }
}

// The product of R rows and any number of columns, a multiple of LANES.
template <typename P, int R, bool ADDS>
inline void product_rows(const typename P::Element* left, int64_t left_stride,
                         const typename P::Element* right, int64_t right_stride, int64_t depth,
                         int64_t columns, float* to, int64_t to_stride) {
    for (int64_t c = 0; c < columns;) {
        const int64_t vectors = (columns - c) / LANES;
        const auto run = [&]<int C>() {
            tile<P, R, C, ADDS>(left, left_stride, right + c, right_stride, depth, to + c,
                                to_stride);
            c += C * LANES;
        };
        if constexpr (COLUMNS == 4) {
            // Five vectors become 3 and 2, not 4 and 1: one alone would wait for its own sums.
            if (vectors == 4 || vectors > 5) {
                run.template operator()<4>();
                continue;
            }
            if (vectors >= 3) {
                run.template operator()<3>();
                continue;
            }
        }
        if (vectors >= 2)
            run.template operator()<2>();
        else
            run.template operator()<1>();
    }
}

// The product of `rows` rows, 1 <= rows <= ROWS; see `tile`.
template <typename P, bool ADDS, int R = ROWS>
inline void product(int64_t rows, const typename P::Element* left, int64_t left_stride,
                    const typename P::Element* right, int64_t right_stride, int64_t depth,
                    int64_t columns, float* to, int64_t to_stride) {
    if constexpr (R > 1) {
        if (rows < R)
            return product<P, ADDS, R - 1>(rows, left, left_stride, right, right_stride, depth,
                                           columns, to, to_stride);
    }
    product_rows<P, R, ADDS>(left, left_stride, right, right_stride, depth, columns, to, to_stride);
}

}  // namespace
}  // namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET
