// dW = Σ_m dy[m]ᵀ · x[m] of bf16 rows, summed in fp32.
//
// The sum runs down the rows, along which the factors of a product would have to be adjacent. So a
// few rows at a time are copied to scratch memory in the order of the products; a transposed copy
// of all rows in memory is not needed. Register tiles are HEIGHT columns of dy, which are
// broadcast, by up to VECTORS vectors of columns of x.
//
// With AVX-512 BF16 a multiplication takes pairs of numbers, from two rows. Otherwise all
// arithmetic is fp32. The copy of dy also sums its columns: the gradient of the bias.

#include "weight_gradient.h"

#include "columns.h"
#include "products.h"

namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET {
namespace {

// Sums, factors and one broadcast value fit in the registers: 32 with AVX-512, 16 otherwise.
#if defined(__AVX512F__)
constexpr int HEIGHT = 8, VECTORS = 3;
#else
constexpr int HEIGHT = 4, VECTORS = 2;
#endif
constexpr int64_t BLOCK = WEIGHT_GRADIENT_BLOCK;
// The rows of x and dy in scratch memory; their copies and a tile's sums stay in the L2 cache.
constexpr int64_t DEPTH_OF_COPY = 128;

static_assert(BLOCK % LANES == 0 && BLOCK % HEIGHT == 0 && DEPTH_OF_COPY % 2 == 0);

#if defined(__AVX512BF16__)
// One step of a product covers two rows.
struct Step : Pairs {
    static constexpr int64_t STEPS = DEPTH_OF_COPY / 2;  // in scratch memory
    static constexpr int64_t COPIES = 1;                 // elements that two numbers become
    static void copy(Vector even, Vector odd, Element* to, int64_t) {
        write(to, (bits_as<Bits>(even) >> 16) | bits_as<Bits>(odd));
    }
};
#else
struct Step : Single {
    static constexpr int64_t STEPS = DEPTH_OF_COPY, COPIES = 2;
    static void copy(Vector even, Vector odd, Element* to, int64_t stride) {
        store(to, even);
        store(to + stride, odd);
    }
};
#endif
using Element = Step::Element;

// Copies `width` columns of `count` rows to [steps, stride], and adds them to `sums` if not null.
void copy(const BFloat16* from, int64_t from_stride, int64_t count, int64_t width, Element* to,
          int64_t stride, float* sums) {
    columns(width, [&](int64_t c, auto lanes) {
        Vector sum = sums ? load(sums + c) : Vector{};
        for (int64_t row = 0; row < count; row += 2) {
            const BFloat16* at = from + row * from_stride + c;
            const Vector even = load(at, lanes);
            const Vector odd = row + 1 < count ? load(at + from_stride, lanes) : Vector{};
            sum += even + odd;
            Step::copy(even, odd, to + row / 2 * Step::COPIES * stride + c, stride);
        }
        if (sums) store(sums + c, sum);
    });
}

// to[r, c] += Σ_k left[k, r] · right[k, c] for HEIGHT rows and C vectors of columns.
template <int C>
inline void tile(const Element* left, const Element* right, int64_t right_stride, int64_t steps,
                 float* to, int64_t to_stride) {
    Vector sums[HEIGHT][C];
#pragma GCC unroll 8
    for (int r = 0; r < HEIGHT; ++r)
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) sums[r][c] = load(to + r * to_stride + c * LANES);
    for (int64_t k = 0; k < steps; ++k) {
        Step::Factor factors[C];
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) factors[c] = Step::factor(right + k * right_stride + c * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < HEIGHT; ++r) {
            const Step::Factor a = Step::broadcast_of(left + k * BLOCK + r);
#pragma GCC unroll 3
            for (int c = 0; c < C; ++c) sums[r][c] = Step::add_product(sums[r][c], a, factors[c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < HEIGHT; ++r)
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) store(to + r * to_stride + c * LANES, sums[r][c]);
}

void add_products(const Element* left, int64_t height, const Element* right, int64_t right_stride,
                  int64_t steps, float* to) {
    for (int64_t c = 0; c < right_stride;) {
        const int64_t vectors = (right_stride - c) / LANES;
        const auto run = [&]<int C>() {
            for (int64_t r = 0; r < height; r += HEIGHT)
                tile<C>(left + r, right + c, right_stride, steps, to + r * right_stride + c,
                        right_stride);
            c += C * LANES;
        };
        // Four vectors become 2 and 2, not 3 and 1: few sums at once wait for one another.
        if (VECTORS == 3 && vectors >= 3 && vectors != 4)
            run.template operator()<VECTORS>();
        else if (vectors >= 2)
            run.template operator()<2>();
        else
            run.template operator()<1>();
    }
}

}  // namespace

int64_t padded_width(int64_t width) { return round_up(width, LANES); }

int64_t weight_gradient_scratch(const WeightGradient& p) {
    return Step::STEPS * (BLOCK + padded_width(p.width)) * sizeof(Element);
}

void weight_gradient(const WeightGradient& p, int64_t begin, int64_t end, void* scratch) {
    const int64_t width = padded_width(p.width);
    Element* left = static_cast<Element*>(scratch);
    Element* right = left + Step::STEPS * BLOCK;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t column = task % p.blocks * BLOCK, first = task / p.blocks * p.chunk;
        const int64_t height = p.height - column < BLOCK ? p.height - column : BLOCK;
        const int64_t last = first + p.chunk < p.rows ? first + p.chunk : p.rows;
        float* to = p.partial + task * BLOCK * width;
        float* sums = p.bias_partial ? p.bias_partial + task * BLOCK : nullptr;
        for (int64_t i = 0; i < BLOCK * width; i += LANES) store(to + i, Vector{});
        for (int64_t i = 0; sums && i < BLOCK; i += LANES) store(sums + i, Vector{});
        // Columns after the last are read by a tile, and their sums are not used.
        for (int64_t i = 0; i < Step::STEPS * BLOCK; ++i) left[i] = 0;
        for (int64_t row = first; row < last; row += DEPTH_OF_COPY) {
            const int64_t count = last - row < DEPTH_OF_COPY ? last - row : DEPTH_OF_COPY;
            copy(p.dy + row * p.dy_stride + column, p.dy_stride, count, height, left, BLOCK, sums);
            copy(p.x + row * p.x_stride, p.x_stride, count, p.width, right, width, nullptr);
            add_products(left, height, right, width, (count + 1) / 2 * Step::COPIES, to);
        }
    }
}

void weight_gradient_sum(const WeightGradient& p, int64_t begin, int64_t end) {
    const int64_t width = padded_width(p.width);
    for (int64_t row = begin; row < end; ++row) {
        const int64_t at = row / BLOCK * BLOCK + row % BLOCK;
        columns(p.width, [&](int64_t c, auto lanes) {
            Vector sum{};
            for (int64_t i = 0; i < p.chunks; ++i)
                sum += load(p.partial + (i * p.blocks * BLOCK + at) * width + c);
            store(p.dweight + row * p.dweight_stride + c, sum, lanes);
        });
        if (!p.bias_partial) continue;
        float sum = 0;
        for (int64_t i = 0; i < p.chunks; ++i) sum += p.bias_partial[i * p.blocks * BLOCK + at];
        p.dbias[row] = sum;
    }
}

}  // namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET
