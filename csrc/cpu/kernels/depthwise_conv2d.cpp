// Depthwise convolution, a block of channels (a vector's lanes) at a time.
//
// Each row of the filter holds its weights in registers beside the sums of SIZE outputs, and slides
// over SIZE + K - 1 inputs, each loaded once. The rows that an output row reads are copied to
// scratch in the L1 cache, once each, with the zero padding written out: one inner loop, free of
// branches, serves every dtype, border, stride and channel count, and image rows that lie a power
// of two apart do not evict each other. Whole blocks of fp32 are read where they lie.
//
// Where the processor multiplies pairs of bf16 (AVX512-BF16), scratch holds each pixel beside its
// right neighbour, and a product takes two columns of the filter at once.

#include "depthwise_conv2d.h"

#include "depthwise_rows.h"

namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET {
namespace {

// SIZE outputs of one row from column w on, summed over the filter's rows i0..i1; K = 0 serves any
// size of it. At the image's LEFT and RIGHT edge, columns beside the image are left out.
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
#pragma GCC unroll 16
                for (int n = 0; n < SIZE; ++n)
                    sum[n] = Product::multiply_add(sum[n], weight, rows.at(i, w + STEP * j + n));
            }
    } else {
#pragma GCC unroll 1
        for (int64_t i = i0; i < i1; ++i) {
            Operand weight[TAPS];
#pragma GCC unroll 8
            for (int j = 0; j < TAPS; ++j) weight[j] = weights[i * TAPS + j];
#pragma GCC unroll 32
            for (int q = 0; q < SIZE + STEP * (TAPS - 1); ++q) {
                if ((LEFT && q < K / 2) || (RIGHT && q >= SIZE + K / 2)) continue;
                const Operand input = rows.at(i, w + q);
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
#pragma GCC unroll 16
    for (int n = 0; n < SIZE; ++n) {
        if (n >= count) break;
        if (p.residual) sum[n] += load(x + n * p.x.pixel_stride, lanes);
        store(y + n * p.y.pixel_stride, sum[n], lanes);
    }
}

// The group's weights to scratch, each block's [channels, kernel, kernel] as [kernel, taps].
template <typename Product>
void copy_weights(const DepthwiseConv2d& p, Task<Product>& task, Vector* bias) {
    const int64_t k = p.kernel, size = k * k, taps = (k + Product::STEP - 1) / Product::STEP;
    with_type(p.weight_dtype, [&]<typename T>(T*) {
        for (int64_t block = 0; block < task.blocks; ++block) {
            const int64_t c0 = task.c0 + block * LANES, lanes = task.lanes(p, block);
            const T* from = static_cast<const T*>(p.weight) + c0 * size;
            bias[block] = p.bias ? load(static_cast<const T*>(p.bias) + c0, lanes) : Vector{};
            const auto column = [&](int64_t i, int64_t j) {
                T values[LANES] = {};
                const int64_t at = p.flipped ? size - 1 - (i * k + j) : i * k + j;
                if (j < k)
                    for (int64_t c = 0; c < lanes; ++c) values[c] = from[c * size + at];
                return Product::input(load(values));
            };
            for (int64_t i = 0; i < k; ++i)
                for (int64_t j = 0; j < k; j += Product::STEP)
                    task.weight(block)[i * taps + j / Product::STEP] =
                        Product::pair(column(i, j), column(i, j + 1));
        }
    });
}

// One block of one row, from scratch.
template <typename Product, int K, typename T>
void convolve_row(const DepthwiseConv2d& p, const Task<Product>& task, int64_t block, Vector bias,
                  const T* x, T* y) {
    const int64_t lanes = task.lanes(p, block);
    const ScratchRows<Product> rows{task, block};
    const auto columns = [&]<int SIZE>(int64_t w) {
        Vector sum[SIZE];
        for (int n = 0; n < SIZE; ++n) sum[n] = bias;
        convolve<Product, K, SIZE, false, false>(rows, task.weight(block), p.kernel, 0, p.kernel, w,
                                                 sum);
        finish<SIZE>(p, sum, p.width - w, lanes, x + w * p.x.pixel_stride,
                     y + w * p.y.pixel_stride);
    };
    int64_t w = 0;
    for (; p.width - w > TILE / 2; w += TILE) columns.template operator()<TILE>(w);
    if (w < p.width) columns.template operator()<TILE / 2>(w);
}

// One block of row h, from where the image lies.
template <int K>
void convolve_row_in_place(const DepthwiseConv2d& p, const Vector* weights, int64_t h, Vector bias,
                           const float* x, float* y) {
    constexpr int64_t PAD = K / 2;
    const ImageRows rows{x - PAD * (p.x.row_stride + p.x.pixel_stride), p.x.row_stride,
                         p.x.pixel_stride};
    const int64_t i0 = h < PAD ? PAD - h : 0, i1 = min(K, p.height + PAD - h);
    const float* next = x + (PAD + 1) * p.x.row_stride;
    const bool more = h + PAD + 1 < p.height;
    for_columns<TILE>(p.width, [&]<bool LEFT, bool RIGHT>(int64_t w) {
        if (more)
            for (int64_t n = 0; n < TILE; ++n)
                __builtin_prefetch(next + (w + n) * p.x.pixel_stride);
        Vector sum[TILE];
        for (int n = 0; n < TILE; ++n) sum[n] = bias;
        convolve<Single, K, TILE, LEFT, RIGHT>(rows, weights, K, i0, i1, w, sum);
        finish<TILE>(p, sum, TILE, LANES, x + w * p.x.pixel_stride, y + w * p.y.pixel_stride);
    });
}

template <typename Product, int K, typename T>
void convolve_tasks(const DepthwiseConv2d& p, int64_t begin, int64_t end, void* scratch) {
    const bool direct = in_place<Product, K, T>(p);
    Task<Product> task(p, scratch);
    for (int64_t number = begin; number < end; ++number) {
        task.select(p, number, p.band);
        Vector bias[GROUP];
        copy_weights(p, task, bias);
        const T* x = static_cast<const T*>(p.x.data) + task.image * p.x.batch_stride + task.c0;
        T* y = static_cast<T*>(p.y.data) + task.image * p.y.batch_stride + task.c0;
        if (!direct) task.start(p, x);
        for (int64_t h = task.h0; h < task.h1; ++h) {
            if (!direct) task.fetch(p, x, h + p.kernel / 2);
            for (int64_t block = 0; block < task.blocks; ++block) {
                const T* from = x + h * p.x.row_stride + block * LANES;
                T* to = y + h * p.y.row_stride + block * LANES;
                if constexpr (Product::STEP == 1 && K > 0 && __is_same(T, float))
                    if (direct) {
                        convolve_row_in_place<K>(p, task.weight(block), h, bias[block], from, to);
                        continue;
                    }
                convolve_row<Product, K>(p, task, block, bias[block], from, to);
            }
        }
    }
}

}  // namespace

int64_t depthwise_conv2d_lanes() { return LANES; }

int64_t depthwise_conv2d_group(const DepthwiseConv2d& p) {
    constexpr int64_t L1 = 24 << 10;
    const int64_t row = scratch_pixels(p) * static_cast<int64_t>(sizeof(Vector));
    const int64_t fitting = L1 / (p.kernel * row);
    return fitting < 1 ? 1 : min(fitting, GROUP);
}

int64_t depthwise_conv2d_scratch(const DepthwiseConv2d& p) {
    const int64_t k = p.kernel, pixels = scratch_pixels(p);
    return (GROUP * k * (k + 1 + pixels) + pixels) * sizeof(Vector) + k * sizeof(int64_t);
}

void depthwise_conv2d(const DepthwiseConv2d& p, int64_t begin, int64_t end, void* scratch) {
    specialise(p, [&]<int K, typename Product, typename T>(Product, T*) {
        convolve_tasks<Product, K, T>(p, begin, end, scratch);
    });
}

}  // namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET
