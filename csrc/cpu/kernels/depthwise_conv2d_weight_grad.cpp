// Gradients of a depthwise convolution's weight and bias, a block of channels at a time.
//
// Like forward with outputs and weights exchanged: for each row of the filter, its sums and SIZE
// gradients are in registers, and the inputs under them are loaded once each. One task computes the
// sums of an image; the images' sums are added afterwards in order.

#include "depthwise_conv2d.h"
#include "depthwise_rows.h"

namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET {
namespace {

// A multiply-add takes at least four cycles: this many independent sums keep the unit busy.
template <int K>
constexpr int SETS = K < 5 ? 2 : 1;

// Adds the products of SIZE gradients, from column w, and the inputs under row i of the filter.
template <typename Product, int K, int SIZE, bool LEFT, bool RIGHT, typename Rows>
inline void correlate(const Rows& rows, int64_t i, int64_t w,
                      const typename Product::Operand (&grads)[SIZE], Vector (&sum)[SETS<K>][K]) {
    constexpr int STEP = Product::STEP;
    auto x = rows.cursor(i, w);
#pragma GCC unroll 32
    for (int q = 0; q < STEP * (SIZE - 1) + K; ++q, x.advance()) {
        if ((LEFT && q < K / 2) || (RIGHT && q >= SIZE + K / 2)) continue;
        const typename Product::Operand input = in_register(x.value());
#pragma GCC unroll 16
        for (int u = 0; u < SIZE; ++u) {
            const int j = q - STEP * u;
            if (j >= 0 && j < K)
                sum[u % SETS<K>][j] = Product::multiply_add(sum[u % SETS<K>][j], grads[u], input);
        }
    }
}

// Calls `function(sum)` with sums for a row of the filter in registers, and adds them to `total`.
// Summing per image row first loses fewer digits than one sum over all pixels.
template <int K, typename Function>
inline void with_sums(Vector* total, const Function& function) {
    Vector sum[SETS<K>][K] = {};
    function(sum);
    for (int j = 0; j < K; ++j)
        total[j] += SETS<K> == 2 ? sum[0][j] + sum[SETS<K> - 1][j] : sum[0][j];
}

// Processes one row of gradients, with gradients and inputs in scratch.
template <typename Product, int K>
void correlate_row(const Task<Product>& task, int64_t block, int64_t width, Vector* total) {
    using Operand = typename Product::Operand;
    constexpr int STEP = Product::STEP, SIZE = TILE / 2;
    const int64_t count = (width + STEP - 1) / STEP;
    for (int64_t i = 0; i < task.kernel; ++i, total += task.kernel) {
        if constexpr (K == 0) {
            for (int64_t j = 0; j < task.kernel; ++j) {
                Vector sum{};
                for (int64_t u = 0; u < count; ++u)
                    sum =
                        Product::multiply_add(sum, task.grads[u], task.row(block, i)[STEP * u + j]);
                total[j] += sum;
            }
        } else {
            with_sums<K>(total, [&](auto& sum) {
                const ScratchRows<Product> rows{task, block};
                const auto columns = [&]<int N>(int64_t u) {
                    Operand grads[N];
#pragma GCC unroll 16
                    for (int n = 0; n < N; ++n) grads[n] = task.grads[u + n];
                    correlate<Product, K, N, false, false>(rows, i, STEP * u, grads, sum);
                };
                int64_t u = 0;
                for (; count - u > SIZE / 2; u += SIZE) columns.template operator()<SIZE>(u);
                if (u < count) columns.template operator()<SIZE / 2>(u);
            });
        }
    }
}

// Processes row h of gradients, reading gradients and inputs in place.
template <int K>
void correlate_row_in_place(const DepthwiseConv2d& p, int64_t h, const float* x, const float* dy,
                            Vector* total) {
    constexpr int64_t PAD = K / 2, SIZE = TILE / 2;
    const ImageRows rows{x - PAD * (p.x.row_stride + p.x.pixel_stride), p.x.row_stride,
                         p.x.pixel_stride};
    const int64_t i0 = h < PAD ? PAD - h : 0, i1 = min(K, p.height + PAD - h);
    for (int64_t i = i0; i < i1; ++i)
        with_sums<K>(total + i * K, [&](auto& sum) {
            for_columns<SIZE>(p.width, [&]<bool LEFT, bool RIGHT>(int64_t w) {
                Vector grads[SIZE];
#pragma GCC unroll 16
                for (int n = 0; n < SIZE; ++n) grads[n] = load(dy + (w + n) * p.y.pixel_stride);
                correlate<Single, K, SIZE, LEFT, RIGHT>(rows, i, w, grads, sum);
            });
        });
}

// Copies a row of gradients to scratch unless `to` is null; returns their sum in fp32.
template <typename Product, typename T>
Vector copy_grads(const DepthwiseConv2d& p, const T* from, bool more, int64_t lanes,
                  typename Product::Operand* to) {
    constexpr int STEP = Product::STEP;
    const int64_t stride = p.y.pixel_stride;
    Vector sum[4] = {};
    for (int64_t w = 0; w < p.width; w += STEP) {
        if (more) __builtin_prefetch(from + p.y.row_stride + w * stride);
        const Vector left = load(from + w * stride, lanes);
        const bool paired = STEP == 2 && w + 1 < p.width;
        const Vector right = paired ? load(from + (w + 1) * stride, lanes) : Vector{};
        sum[w % 4] += left;
        if constexpr (STEP == 2) sum[w % 4 + 1] += right;
        if (to) to[w / STEP] = Product::pair(Product::input(left), Product::input(right));
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <typename Product, int K, typename T>
void correlate_tasks(const DepthwiseConv2d& p, int64_t begin, int64_t end, void* scratch) {
    const bool direct = in_place(p);
    const int64_t k = p.kernel, sums = k * k + 1;
    const int64_t all = round_up(p.channels, LANES) / LANES;
    Task<Product> task(p, scratch);
    for (int64_t number = begin; number < end; ++number) {
        task.select(p, number, p.height);
        const T* x = static_cast<const T*>(p.x.data) + task.image * p.x.batch_stride + task.c0;
        const T* dy = static_cast<const T*>(p.y.data) + task.image * p.y.batch_stride + task.c0;
        auto* totals =
            reinterpret_cast<Vector*>(p.partial) + (task.image * all + task.first_block) * sums;
        for (int64_t i = 0; i < task.blocks * sums; ++i) totals[i] = Vector{};
        if (!direct) task.start(p, x);
        for (int64_t h = 0; h < p.height; ++h) {
            if (!direct) task.fetch(p, x, h + k / 2);
            for (int64_t block = 0; block < task.blocks; ++block) {
                const T* from = dy + h * p.y.row_stride + block * LANES;
                Vector* total = totals + block * sums;
                total[k * k] += copy_grads<Product>(p, from, h + 1 < p.height, task.lanes(p, block),
                                                    direct ? nullptr : task.grads);
                if constexpr (MAY_BE_IN_PLACE<Product, K, T>)
                    if (direct) {
                        const T* under = x + h * p.x.row_stride + block * LANES;
                        correlate_row_in_place<K>(p, h, under, from, total);
                        continue;
                    }
                correlate_row<Product, K>(task, block, p.width, total);
            }
        }
    }
}

}  // namespace

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
