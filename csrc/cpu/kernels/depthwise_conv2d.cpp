// Depthwise convolution, a block of channels (a vector's lanes) at a time.
//
// For each row of the filter, its weights and the sums of SIZE outputs are in registers, and
// SIZE + K - 1 inputs are loaded once each. The rows that an output row reads are copied to scratch
// in the L1 cache, once each, together with the zero padding: one inner loop without branches
// serves every dtype, border, stride and channel count, and image rows that are a power of two
// apart do not evict each other. Whole blocks of fp32 are read in place.
//
// If the processor multiplies pairs of bf16 (AVX512-BF16), scratch stores each pixel next to its
// right neighbour, and one product handles two columns of the filter.

#include "depthwise_conv2d.h"

#include "depthwise_rows.h"

namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET {
namespace {

// Computes SIZE outputs of one row from column w, summed over the filter's rows i0..i1; K = 0
// serves any filter size. At the LEFT and RIGHT edge of the image, columns outside it are skipped.
template <typename Product, int K, int SIZE, bool LEFT, bool RIGHT, typename Rows>
inline void convolve(const Rows& rows, const typename Product::Operand* weights, int64_t kernel,
                     int64_t i0, int64_t i1, int64_t w, Vector (&sum)[SIZE]) {
    using Operand = typename Product::Operand;
    constexpr int STEP = Product::STEP, TAPS = (K + STEP - 1) / STEP;
    if constexpr (K == 0) {
        const int64_t taps = (kernel + STEP - 1) / STEP;
        for (int64_t i = i0; i < i1; ++i)
            for (int64_t j = 0; j < taps; ++j) {
                const Operand weight = weights[i * taps + j];
                auto x = rows.cursor(i, w + STEP * j);
#pragma GCC unroll 16
                for (int n = 0; n < SIZE; ++n, x.advance())
                    sum[n] = Product::multiply_add(sum[n], weight, x.value());
            }
    } else {
#pragma GCC unroll 1
        for (int64_t i = i0; i < i1; ++i) {
            auto x = rows.cursor(i, w);
            Operand weight[TAPS];
#pragma GCC unroll 8
            for (int j = 0; j < TAPS; ++j) weight[j] = weights[i * TAPS + j];
#pragma GCC unroll 32
            for (int q = 0; q < SIZE + STEP * (TAPS - 1); ++q, x.advance()) {
                if ((LEFT && q < K / 2) || (RIGHT && q >= SIZE + K / 2)) continue;
                const Operand input = in_register(x.value());
#pragma GCC unroll 8
                for (int j = 0; j < TAPS; ++j) {
                    const int n = q - STEP * j;
                    if (n >= 0 && n < SIZE)
                        sum[n] = Product::multiply_add(sum[n], weight[j], input);
                }
            }
        }
    }
}

// Adds the residual and writes the first `count` of SIZE outputs.
template <int SIZE, typename T>
inline void finish(const DepthwiseConv2d& p, Vector (&sum)[SIZE], int64_t count, int64_t lanes,
                   const T* x, T* y) {
    // Copies: as far as the compiler knows, a store could change p.
    const int64_t x_stride = p.x.pixel_stride, y_stride = p.y.pixel_stride;
    if (p.residual) {
#pragma GCC unroll 16
        for (int n = 0; n < SIZE; ++n, x += x_stride) {
            if (n >= count) break;
            sum[n] += load(x, lanes);
        }
    }
#pragma GCC unroll 16
    for (int n = 0; n < SIZE; ++n, y += y_stride) {
        if (n >= count) break;
        store(y, sum[n], lanes);
    }
}

// The number of operands of a block's packed weights: [kernel, taps] and the bias.
template <typename Product>
int64_t packed_size(int64_t k) {
    return k * ((k + Product::STEP - 1) / Product::STEP) + 1;
}

template <typename Product>
const typename Product::Operand* packed(const DepthwiseConv2d& p, int64_t block) {
    return static_cast<const typename Product::Operand*>(p.packed) +
           block * packed_size<Product>(p.kernel);
}

template <typename Product>
void pack(const DepthwiseConv2d& p, int64_t begin, int64_t end) {
    const int64_t k = p.kernel, size = k * k;
    with_type(p.weight_dtype, [&]<typename T>(T*) {
        for (int64_t block = begin; block < end; ++block) {
            const int64_t c0 = block * LANES, lanes = min(LANES, p.channels - c0);
            const T* from = static_cast<const T*>(p.weight) + c0 * size;
            const auto column = [&](int64_t i, int64_t j) {
                T values[LANES] = {};
                const int64_t at = p.flipped ? size - 1 - (i * k + j) : i * k + j;
                if (j < k)
                    for (int64_t c = 0; c < lanes; ++c) values[c] = from[c * size + at];
                return Product::input(load(values));
            };
            auto* to = const_cast<typename Product::Operand*>(packed<Product>(p, block));
            for (int64_t i = 0; i < k; ++i)
                for (int64_t j = 0; j < k; j += Product::STEP)
                    *to++ = Product::pair(column(i, j), column(i, j + 1));
            const Vector bias = p.bias ? load(static_cast<const T*>(p.bias) + c0, lanes) : Vector{};
            write(to, bias);
        }
    });
}

// Computes one block of one row, from scratch.
template <typename Product, int K, typename T>
void convolve_row(const DepthwiseConv2d& p, const Task<Product>& task, int64_t block, const T* x,
                  T* y) {
    const int64_t lanes = task.lanes(p, block);
    const auto* weights = packed<Product>(p, task.first_block + block);
    const Vector bias = read<Vector>(weights + packed_size<Product>(p.kernel) - 1);
    const ScratchRows<Product> rows{task, block};
    const auto columns = [&]<int SIZE>(int64_t w) {
        Vector sum[SIZE];
        for (int n = 0; n < SIZE; ++n) sum[n] = bias;
        convolve<Product, K, SIZE, false, false>(rows, weights, p.kernel, 0, p.kernel, w, sum);
        finish<SIZE>(p, sum, p.width - w, lanes, x + w * p.x.pixel_stride,
                     y + w * p.y.pixel_stride);
    };
    int64_t w = 0;
    for (; p.width - w > TILE / 2; w += TILE) columns.template operator()<TILE>(w);
    if (w < p.width) columns.template operator()<TILE / 2>(w);
}

// Computes one block of row h, reading the image in place.
template <int K>
void convolve_row_in_place(const DepthwiseConv2d& p, int64_t block, int64_t h, const float* x,
                           float* y) {
    constexpr int64_t PAD = K / 2;
    const Vector* weights = packed<Single>(p, block);
    const Vector bias = weights[K * K];
    const ImageRows rows{x - PAD * (p.x.row_stride + p.x.pixel_stride), p.x.row_stride,
                         p.x.pixel_stride};
    const int64_t i0 = h < PAD ? PAD - h : 0, i1 = min(K, p.height + PAD - h);
    for_columns<TILE>(p.width, [&]<bool LEFT, bool RIGHT>(int64_t w) {
        Vector sum[TILE];
        for (int n = 0; n < TILE; ++n) sum[n] = bias;
        convolve<Single, K, TILE, LEFT, RIGHT>(rows, weights, K, i0, i1, w, sum);
        finish<TILE>(p, sum, TILE, LANES, x + w * p.x.pixel_stride, y + w * p.y.pixel_stride);
    });
}

template <typename Product, int K, typename T>
void convolve_tasks(const DepthwiseConv2d& p, int64_t begin, int64_t end, void* scratch) {
    const bool direct = in_place(p);
    Task<Product> task(p, scratch);
    for (int64_t number = begin; number < end; ++number) {
        task.select(p, number, p.band);
        const T* x = static_cast<const T*>(p.x.data) + task.image * p.x.batch_stride + task.c0;
        T* y = static_cast<T*>(p.y.data) + task.image * p.y.batch_stride + task.c0;
        if (!direct) task.start(p, x);
        for (int64_t h = task.h0; h < task.h1; ++h) {
            if (!direct) task.fetch(p, x, h + p.kernel / 2);
            for (int64_t block = 0; block < task.blocks; ++block) {
                const T* from = x + h * p.x.row_stride + block * LANES;
                T* to = y + h * p.y.row_stride + block * LANES;
                if constexpr (MAY_BE_IN_PLACE<Product, K, T>)
                    if (direct) {
                        convolve_row_in_place<K>(p, task.first_block + block, h, from, to);
                        continue;
                    }
                convolve_row<Product, K>(p, task, block, from, to);
            }
        }
    }
}

}  // namespace

int64_t depthwise_conv2d_lanes() { return LANES; }

int64_t depthwise_conv2d_group(const DepthwiseConv2d& p) {
    const int64_t cache = in_place(p) ? 512 << 10 : 24 << 10;
    const int64_t block = p.kernel * scratch_pixels(p) * sizeof(Vector);
    return cache < block ? 1 : min(cache / block, in_place(p) ? p.channels : 4);
}

int64_t depthwise_conv2d_scratch(const DepthwiseConv2d& p) {
    const int64_t rows = in_place(p) ? 0 : p.group * p.kernel, pixels = scratch_pixels(p);
    return (1 + rows) * pixels * sizeof(Vector) +
           round_up(p.kernel * sizeof(int64_t), sizeof(Vector));
}

int64_t depthwise_conv2d_packed(const DepthwiseConv2d& p) {
    return round_up(p.channels, LANES) / LANES * packed_size<Single>(p.kernel) * sizeof(Vector);
}

void depthwise_conv2d_pack(const DepthwiseConv2d& p, int64_t begin, int64_t end) {
#if defined(__AVX512BF16__)
    if (pairs(p)) return pack<Pairs>(p, begin, end);
#endif
    pack<Single>(p, begin, end);
}

void depthwise_conv2d(const DepthwiseConv2d& p, int64_t begin, int64_t end, void* scratch) {
    specialise(p, [&]<int K, typename Product, typename T>(Product, T*) {
        convolve_tasks<Product, K, T>(p, begin, end, scratch);
    });
}

}  // namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET
