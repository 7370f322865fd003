// Depthwise convolution and its gradients, a block of channels (a vector's lanes) at a time.
//
// The rows that an output row reads are copied to scratch in the L1 cache, once each, with the zero
// padding written out: one inner loop, free of branches, serves every dtype, border, stride and
// channel count, and image rows that lie a power of two apart do not evict each other. Each row of
// the filter holds its weights in registers beside the sums of TILE outputs, and slides over
// TILE + K - 1 inputs, each loaded once. The weight gradient is the same with outputs and weights
// exchanged: sums for a row of the filter beside TILE gradients, sliding over the inputs.
//
// Where the processor multiplies pairs of bf16 (AVX512-BF16), scratch holds each pixel beside its
// right neighbour, and a product takes two columns at once. The last column of an odd filter, or of
// an odd width, is paired with a zero.

#include "depthwise_conv2d.h"

#include "../vector.h"

namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET {
namespace {

// Sums, weights and an input have to fit in the registers: 32 of AVX-512, 16 of the others.
constexpr int TILE = LANES == 16 ? 16 : 8;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// How products are taken: STEP columns at once, from operands that hold as many pixels.
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

// The block, band and image of a task, and its scratch.
template <typename Product>
struct Task {
    using Operand = typename Product::Operand;

    int64_t block, image, c0, lanes, h0, h1;
    int64_t pixels;  // of a scratch row
    Operand* weight;
    Operand* grads;
    Operand* space;
    Operand** rows;  // the kernel's rows of the image, the uppermost first

    Task(const DepthwiseConv2d& p, void* scratch) {
        const int64_t k = p.kernel;
        pixels = round_up(p.width, TILE * Product::STEP) + k + 1;
        weight = static_cast<Operand*>(scratch);
        grads = weight + k * (k + 1);
        space = grads + pixels;
        rows = reinterpret_cast<Operand**>(space + k * pixels);
    }

    void select(const DepthwiseConv2d& p, int64_t task, int64_t bands, int64_t band_height) {
        const int64_t blocks = round_up(p.channels, LANES) / LANES;
        block = task % blocks;
        image = task / blocks / bands;
        c0 = block * LANES;
        lanes = min(LANES, p.channels - c0);
        h0 = task / blocks % bands * band_height;
        h1 = min(h0 + band_height, p.height);
        for (int64_t i = 0; i < p.kernel; ++i) rows[i] = space + i * pixels;
        for (int64_t i = 0; i < p.kernel * pixels; ++i) space[i] = Operand{};
    }

    // Moves the ring on to row h, whose outer columns stay zero.
    template <typename T>
    void fetch(const DepthwiseConv2d& p, const T* x, int64_t h) {
        Operand* row = rows[0];
        for (int64_t i = 1; i < p.kernel; ++i) rows[i - 1] = rows[i];
        rows[p.kernel - 1] = row;
        const int64_t pad = p.kernel / 2;
        if (h < 0 || h >= p.height) {
            for (int64_t w = 0; w < pixels; ++w) row[w] = Operand{};
            return;
        }
        const T* from = x + h * p.x.row_stride;
        const int64_t stride = p.x.pixel_stride;
        const bool more = h + 1 < p.height;
        row += pad;
        Operand before{};
        for (int64_t w = 0; w < p.width; ++w) {
            if (more) __builtin_prefetch(from + p.x.row_stride + w * stride);
            const Operand now = Product::input(from + w * stride, lanes);
            if constexpr (Product::STEP == 1)
                row[w] = now;
            else if (w + pad > 0)
                row[w - 1] = Product::pair(before, now);
            before = now;
        }
        if constexpr (Product::STEP == 2) row[p.width - 1] = Product::pair(before, Operand{});
    }
};

// SIZE outputs of one row from column w on, summed over the filter; K = 0 serves any size of it.
template <typename Product, int K, int SIZE>
inline void convolve(const Task<Product>& task, int64_t kernel, int64_t w, Vector start,
                     Vector (&sum)[SIZE]) {
    using Operand = typename Product::Operand;
    constexpr int STEP = Product::STEP, TAPS = (K + STEP - 1) / STEP;
    for (int n = 0; n < SIZE; ++n) sum[n] = start;
    if constexpr (K == 0) {
        const int64_t taps = (kernel + STEP - 1) / STEP;
        for (int64_t i = 0; i < kernel; ++i)
            for (int64_t j = 0; j < taps; ++j) {
                const Operand weight = task.weight[i * taps + j];
                const Operand* x = task.rows[i] + w + STEP * j;
#pragma GCC unroll 16
                for (int n = 0; n < SIZE; ++n) sum[n] = Product::multiply_add(sum[n], weight, x[n]);
            }
    } else {
#pragma GCC unroll 1
        for (int i = 0; i < K; ++i) {
            const Operand* x = task.rows[i] + w;
            Operand weight[TAPS];
#pragma GCC unroll 8
            for (int j = 0; j < TAPS; ++j) weight[j] = task.weight[i * TAPS + j];
#pragma GCC unroll 32
            for (int q = 0; q < SIZE + STEP * (TAPS - 1); ++q) {
                const Operand input = x[q];
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

template <typename Product, int K, int SIZE, typename T>
inline void convolve_and_store(const DepthwiseConv2d& p, const Task<Product>& task, Vector bias,
                               int64_t w, const T* x, T* y) {
    Vector sum[SIZE];
    convolve<Product, K, SIZE>(task, p.kernel, w, bias, sum);
    const int64_t count = min(SIZE, p.width - w);
#pragma GCC unroll 1
    for (int64_t n = 0; n < count; ++n) {
        if (p.residual) sum[n] += load(x + (w + n) * p.x.pixel_stride, task.lanes);
        store(y + (w + n) * p.y.pixel_stride, sum[n], task.lanes);
    }
}

// A block's [channels, kernel, kernel] to scratch as [kernel, taps].
template <typename Product>
void copy_weight(const DepthwiseConv2d& p, Task<Product>& task) {
    const int64_t k = p.kernel, size = k * k, taps = (k + Product::STEP - 1) / Product::STEP;
    with_type(p.weight_dtype, [&]<typename T>(T*) {
        const T* from = static_cast<const T*>(p.weight) + task.c0 * size;
        const auto column = [&](int64_t i, int64_t j) {
            T values[LANES] = {};
            const int64_t at = p.flipped ? size - 1 - (i * k + j) : i * k + j;
            if (j < k)
                for (int64_t c = 0; c < task.lanes; ++c) values[c] = from[c * size + at];
            return Product::input(load(values));
        };
        for (int64_t i = 0; i < k; ++i)
            for (int64_t j = 0; j < taps; ++j)
                task.weight[i * taps + j] =
                    Product::pair(column(i, Product::STEP * j), column(i, Product::STEP * j + 1));
    });
}

template <typename Product, int K, typename T>
void convolve_tasks(const DepthwiseConv2d& p, int64_t begin, int64_t end, void* scratch) {
    const int64_t pad = p.kernel / 2;
    Task<Product> task(p, scratch);
    for (int64_t number = begin; number < end; ++number) {
        task.select(p, number, p.bands(), p.band);
        copy_weight(p, task);
        Vector bias{};
        if (p.bias)
            with_type(p.weight_dtype, [&]<typename W>(W*) {
                bias = load(static_cast<const W*>(p.bias) + task.c0, task.lanes);
            });
        const T* x = static_cast<const T*>(p.x.data) + task.image * p.x.batch_stride + task.c0;
        T* y = static_cast<T*>(p.y.data) + task.image * p.y.batch_stride + task.c0;
        for (int64_t h = task.h0 - pad; h < task.h0 + pad; ++h) task.fetch(p, x, h);
        for (int64_t h = task.h0; h < task.h1; ++h) {
            task.fetch(p, x, h + pad);
            const T* row = x + h * p.x.row_stride;
            T* out = y + h * p.y.row_stride;
            int64_t w = 0;
            for (; p.width - w > TILE / 2; w += TILE)
                convolve_and_store<Product, K, TILE>(p, task, bias, w, row, out);
            if (w < p.width) convolve_and_store<Product, K, TILE / 2>(p, task, bias, w, row, out);
        }
    }
}

// Adds one row of gradients, from operand u on, times the inputs, to the sums of a filter's row.
template <typename Product, int K, int SIZE, int SETS>
inline void correlate(const typename Product::Operand* x, const typename Product::Operand* grads,
                      Vector (&sum)[SETS][K]) {
    using Operand = typename Product::Operand;
    constexpr int STEP = Product::STEP;
    Operand grad[SIZE];
#pragma GCC unroll 16
    for (int u = 0; u < SIZE; ++u) grad[u] = grads[u];
#pragma GCC unroll 32
    for (int q = 0; q < STEP * (SIZE - 1) + K; ++q) {
        const Operand input = x[q];
#pragma GCC unroll 16
        for (int u = 0; u < SIZE; ++u) {
            const int j = q - STEP * u;
            if (j >= 0 && j < K)
                sum[u % SETS][j] = Product::multiply_add(sum[u % SETS][j], grad[u], input);
        }
    }
}

// One row of the filter, at one row of the gradients.
template <typename Product, int K>
inline void correlate_row(const typename Product::Operand* x,
                          const typename Product::Operand* grads, int64_t count, int64_t kernel,
                          Vector* total) {
    constexpr int STEP = Product::STEP, SIZE = TILE / 2;
    if constexpr (K == 0) {
        for (int64_t j = 0; j < kernel; ++j)
            for (int64_t u = 0; u < count; ++u)
                total[j] = Product::multiply_add(total[j], grads[u], x[STEP * u + j]);
    } else {
        // A multiply-add takes four cycles or more: as many independent sums keep the unit busy.
        constexpr int SETS = K < 5 ? 2 : 1;
        Vector sum[SETS][K] = {};
        for (int j = 0; j < K; ++j) sum[0][j] = total[j];
        int64_t u = 0;
        for (; count - u > SIZE / 2; u += SIZE)
            correlate<Product, K, SIZE>(x + STEP * u, grads + u, sum);
        if (u < count) correlate<Product, K, SIZE / 2>(x + STEP * u, grads + u, sum);
        for (int j = 0; j < K; ++j) total[j] = SETS == 2 ? sum[0][j] + sum[SETS - 1][j] : sum[0][j];
    }
}

template <typename Product, int K, typename T>
void correlate_tasks(const DepthwiseConv2d& p, int64_t begin, int64_t end, void* scratch) {
    constexpr int STEP = Product::STEP;
    const int64_t k = p.kernel, pad = k / 2, blocks = round_up(p.channels, LANES) / LANES;
    const int64_t count = (p.width + STEP - 1) / STEP;
    Task<Product> task(p, scratch);
    for (int64_t u = 0; u < task.pixels; ++u) task.grads[u] = typename Product::Operand{};
    for (int64_t number = begin; number < end; ++number) {
        task.select(p, number, 1, p.height);
        const T* x = static_cast<const T*>(p.x.data) + task.image * p.x.batch_stride + task.c0;
        const T* dy = static_cast<const T*>(p.y.data) + task.image * p.y.batch_stride + task.c0;
        auto* total =
            reinterpret_cast<Vector*>(p.partial) + (task.image * blocks + task.block) * (k * k + 1);
        for (int64_t i = 0; i < k * k; ++i) total[i] = Vector{};
        Vector bias[2 * STEP] = {};
        for (int64_t h = -pad; h < pad; ++h) task.fetch(p, x, h);
        for (int64_t h = 0; h < p.height; ++h) {
            task.fetch(p, x, h + pad);
            const T* row = dy + h * p.y.row_stride;
            for (int64_t w = 0; w < p.width; w += STEP) {
                Vector value[2] = {load(row + w * p.y.pixel_stride, task.lanes)};
                if (STEP == 2 && w + 1 < p.width)
                    value[1] = load(row + (w + 1) * p.y.pixel_stride, task.lanes);
                for (int n = 0; n < STEP; ++n) bias[w % (2 * STEP) + n] += value[n];
                task.grads[w / STEP] =
                    Product::pair(Product::input(value[0]), Product::input(value[1]));
            }
            for (int64_t i = 0; i < k; ++i)
                correlate_row<Product, K>(task.rows[i], task.grads, count, k, total + i * k);
        }
        Vector sum = bias[0] + bias[1];
        if constexpr (STEP == 2) sum += bias[2] + bias[3];
        total[k * k] = sum;
    }
}

// Calls `function` with how products are taken, the size of the filter (0: any) and x's type.
template <typename Function>
void specialise(const DepthwiseConv2d& p, Function function) {
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
        if constexpr (sizeof(T) == 4 || __is_same(T, BFloat16))
            if (p.weight_dtype == DType::BFLOAT16) return with_kernel(Pairs{}, type);
#endif
        with_kernel(Single{}, type);
    });
}

}  // namespace

int64_t depthwise_conv2d_lanes() { return LANES; }

int64_t depthwise_conv2d_scratch(const DepthwiseConv2d& p) {
    const int64_t k = p.kernel, pixels = round_up(p.width, 2 * TILE) + k + 1;
    return (k * (k + 1) + (k + 1) * pixels) * sizeof(Vector) + k * sizeof(void*);
}

void depthwise_conv2d(const DepthwiseConv2d& p, int64_t begin, int64_t end, void* scratch) {
    specialise(p, [&]<int K, typename Product, typename T>(Product, T*) {
        convolve_tasks<Product, K, T>(p, begin, end, scratch);
    });
}

void depthwise_conv2d_weight_grad(const DepthwiseConv2d& p, int64_t begin, int64_t end,
                                  void* scratch) {
    specialise(p, [&]<int K, typename Product, typename T>(Product, T*) {
        correlate_tasks<Product, K, T>(p, begin, end, scratch);
    });
}

void depthwise_conv2d_weight_sum(const DepthwiseConv2d& p, int64_t begin, int64_t end) {
    const int64_t blocks = round_up(p.channels, LANES) / LANES, size = p.kernel * p.kernel;
    for (int64_t block = begin; block < end; ++block)
        for (int64_t tap = 0; tap <= size; ++tap) {
            Vector total{};
            for (int64_t image = 0; image < p.batch; ++image)
                total += reinterpret_cast<const Vector*>(
                    p.partial)[(image * blocks + block) * (size + 1) + tap];
            float lanes[LANES];
            store(lanes, total);
            const int64_t c0 = block * LANES, count = min(LANES, p.channels - c0);
            for (int64_t c = 0; c < count; ++c)
                if (tap < size)
                    p.weight_grad[(c0 + c) * size + tap] = lanes[c];
                else
                    p.bias_grad[c0 + c] = lanes[c];
        }
}

}  // namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET
