// How the rows under a depthwise filter are read. For depthwise_conv2d*.cpp only.
#pragma once

#include "../vector.h"
#include "depthwise_conv2d.h"

namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET {
namespace {

// Sums, weights and an input must fit in the registers: AVX-512 has 32, the others 16.
constexpr int TILE = LANES == 16 ? 16 : 8;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t scratch_pixels(const DepthwiseConv2d& p) {
    return round_up(p.width, 2 * TILE) + p.kernel + 1;
}

// How products are computed: STEP columns at once, from operands of STEP pixels.
struct Single {
    static constexpr int STEP = 1;
    using Operand = Vector;

    template <typename T>
    static Operand input(const T* from, int64_t lanes) {
        return load(from, lanes);
    }
    static Operand input(Vector value) { return value; }
    static Operand pair(Operand left, Operand) { return left; }
    static Vector multiply_add(Vector sum, Operand a, Operand b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
// Two columns of bf16 at once. The last column of an odd filter is paired with a zero.
struct Pairs {
    static constexpr int STEP = 2;
    using Operand = Bits;

    static Operand input(Vector value) {
        return (Bits)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(value));
    }
    static Operand input(const float* from, int64_t lanes) { return input(load(from, lanes)); }
    static Operand input(const BFloat16* from, int64_t lanes) {
        return (Bits)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(lanes), from));
    }
    static Operand pair(Operand left, Operand right) { return left | right << 16; }
    static Vector multiply_add(Vector sum, Operand a, Operand b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
};
#endif

// The channels, rows and image of a task, and its scratch.
//
// A task processes a group of neighbouring blocks of channels row by row, so that it reads several
// whole cache lines of each pixel. The group is the largest for which the rows under the filter
// stay in the cache: L1 if they are copied to scratch, L2 if they are read in place.
template <typename Product>
struct Task {
    using Operand = typename Product::Operand;

    int64_t kernel, pixels;              // pixels of a scratch row
    int64_t image, first_block, blocks;  // blocks of this group
    int64_t c0, h0, h1;
    Operand* space;  // [group, k rows of pixels]
    Operand* grads;
    int64_t* rows;  // offsets of the filter's rows, the uppermost first

    Task(const DepthwiseConv2d& p, void* scratch) : kernel(p.kernel) {
        pixels = scratch_pixels(p);
        grads = static_cast<Operand*>(scratch);
        rows = reinterpret_cast<int64_t*>(grads + pixels);
        space =
            grads + pixels + round_up(kernel * sizeof(int64_t), sizeof(Operand)) / sizeof(Operand);
        for (int64_t w = 0; w < pixels; ++w) grads[w] = Operand{};
    }

    Operand* row(int64_t block, int64_t i) const {
        return space + block * kernel * pixels + rows[i];
    }
    int64_t lanes(const DepthwiseConv2d& p, int64_t block) const {
        return min(LANES, p.channels - c0 - block * LANES);
    }

    void select(const DepthwiseConv2d& p, int64_t task, int64_t band_height) {
        const int64_t all = round_up(p.channels, LANES) / LANES;
        const int64_t groups = (all + p.group - 1) / p.group;
        const int64_t bands = (p.height + band_height - 1) / band_height;
        first_block = task % groups * p.group;
        blocks = min(p.group, all - first_block);
        c0 = first_block * LANES;
        image = task / groups / bands;
        h0 = task / groups % bands * band_height;
        h1 = min(h0 + band_height, p.height);
    }

    // Fills the ring buffer with the rows above row h0 of the image, which is fetched next.
    template <typename T>
    void start(const DepthwiseConv2d& p, const T* x) {
        for (int64_t i = 0; i < kernel; ++i) rows[i] = i * pixels;
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t i = 0; i < kernel * pixels; ++i) row(block, 0)[i] = Operand{};
        for (int64_t h = h0 - kernel / 2; h < h0 + kernel / 2; ++h) fetch(p, x, h);
    }

    // Advances the ring buffer to row h of the image. Columns outside the image stay zero.
    template <typename T>
    void fetch(const DepthwiseConv2d& p, const T* x, int64_t h) {
        const int64_t oldest = rows[0];
        for (int64_t i = 1; i < kernel; ++i) rows[i - 1] = rows[i];
        rows[kernel - 1] = oldest;
        const bool outside = h < 0 || h >= p.height;
        for (int64_t block = 0; block < blocks; ++block) {
            Operand* to = row(block, kernel - 1);
            if (outside)
                for (int64_t w = 0; w < pixels; ++w) to[w] = Operand{};
            else
                copy_row(p, x + h * p.x.row_stride + block * LANES, h + 1 < p.height,
                         lanes(p, block), to + kernel / 2);
        }
    }

    template <typename T>
    void copy_row(const DepthwiseConv2d& p, const T* from, bool more, int64_t count, Operand* to) {
        const int64_t stride = p.x.pixel_stride;
        Operand before{};
        for (int64_t w = 0; w < p.width; ++w) {
            if (more) __builtin_prefetch(from + p.x.row_stride + w * stride);
            const Operand now = Product::input(from + w * stride, count);
            if constexpr (Product::STEP == 1)
                to[w] = now;
            else if (w + kernel / 2 > 0)
                to[w - 1] = Product::pair(before, now);
            before = now;
        }
        if constexpr (Product::STEP == 2) to[p.width - 1] = Product::pair(before, Operand{});
    }
};

// Makes the compiler load a value once instead of with each product.
template <typename V>
inline V in_register(V value) {
#if defined(__x86_64__)
    asm("" : "+v"(value));
#endif
    return value;
}

// The rows under the filter in scratch; columns begin k/2 to the left of the image.
template <typename Product>
struct ScratchRows {
    struct Cursor {
        const typename Product::Operand* x;

        typename Product::Operand value() const { return *x; }
        void advance() { ++x; }
    };

    const Task<Product>& task;
    int64_t block;

    Cursor cursor(int64_t i, int64_t column) const { return {task.row(block, i) + column}; }
};

// The rows under the filter in place, in fp32; callers must not read outside the image.
struct ImageRows {
    struct Cursor {
        const float* x;
        int64_t stride;

        Vector value() const { return load(x); }
        void advance() {
            x += stride;
#if defined(__x86_64__)
            // One address after the other: there are too few registers for all at once.
            asm("" : "+r"(x));
#endif
        }
    };

    const float* first;  // the input under the filter's first weight, for output column 0
    int64_t row_stride, pixel_stride;

    Cursor cursor(int64_t i, int64_t column) const {
        return {first + i * row_stride + column * pixel_stride, pixel_stride};
    }
};

// True if products are computed in pairs.
inline bool pairs(const DepthwiseConv2d& p) {
#if defined(__AVX512BF16__)
    return p.weight_dtype == DType::BFLOAT16;
#else
    return false && p.kernel;
#endif
}

// True if rows are read in place: fp32, whole blocks and tiles, a filter of known size. Copying
// them would take longer than computing a small filter.
inline bool in_place(const DepthwiseConv2d& p) {
    return p.x.dtype == DType::FLOAT32 && !pairs(p) && p.channels % LANES == 0 &&
           p.width % TILE == 0 && (p.kernel == 3 || p.kernel == 5 || p.kernel == 7);
}

template <typename Product, int K, typename T>
constexpr bool MAY_BE_IN_PLACE = Product::STEP == 1 && K > 0 && __is_same(T, float);

// Calls `function<LEFT, RIGHT>(w)` for each SIZE columns of a row; LEFT and RIGHT are true for the
// image's first and last ones.
template <int SIZE, typename Function>
inline void for_columns(int64_t width, const Function& function) {
    if (width == SIZE) return function.template operator()<true, true>(0);
    function.template operator()<true, false>(0);
    for (int64_t w = SIZE; w < width - SIZE; w += SIZE)
        function.template operator()<false, false>(w);
    function.template operator()<false, true>(width - SIZE);
}

// Calls `function<K>(Product, T*)` with the size of the filter (0: any), how products are computed
// and the type of x.
template <typename Function>
inline void specialise(const DepthwiseConv2d& p, Function function) {
    const auto with_kernel = [&](auto product, auto* type) {
        switch (p.kernel) {
            case 3:
                return function.template operator()<3>(product, type);
            case 5:
                return function.template operator()<5>(product, type);
            case 7:
                return function.template operator()<7>(product, type);
            default:
                return function.template operator()<0>(product, type);
        }
    };
    with_type(p.x.dtype, [&]<typename T>(T* type) {
#if defined(__AVX512BF16__)
        if constexpr (__is_same(T, float) || __is_same(T, BFloat16))
            if (pairs(p)) return with_kernel(Pairs{}, type);
#endif
        with_kernel(Single{}, type);
    });
}

}  // namespace
}  // namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET
