// Device code of the depthwise convolution's weight and bias gradients; does not depend on torch.
//
// A thread keeps one channel's K x K sums in registers and moves down the rows of C neighbouring
// columns, with the K rows of dy that an input row contributes to. Two steps, in a fixed order:
// each block sums over its segments, then `depthwise_conv2d_weight_sum_kernel` sums over the
// blocks.
#pragma once

#include <algorithm>

#include "cuda/depthwise_conv2d.cuh"

namespace dimr_fast {

template <typename T, int K, int C>
constexpr int depthwise_conv2d_weight_shared() {
    constexpr int ROWS = RowLoader<T, C, K / 2>::ELEMENTS + RowLoader<T, C, 0>::ELEMENTS;
    constexpr int SUMS = DEPTHWISE_LANES * (K * K + 1) * sizeof(float);
    return std::max<int>(STAGES * ROWS * sizeof(T), SUMS);
}

//   partial [gridDim.x / tiles.channel_tiles, K * K + 1, channels]: the sums of each tap, then of
//   dy
// Block (channel tile, split) processes every splits-th segment of all images.
template <typename T, int K, int C>
__global__ void __launch_bounds__(DEPTHWISE_THREADS, depthwise_blocks(K))
    depthwise_conv2d_weight_kernel(Features<T> x, Features<T> dy, float* __restrict__ partial,
                                   DepthwiseShape shape, DepthwiseTiles tiles) {
    constexpr int PAD = K / 2;
    using XLoader = RowLoader<T, C, PAD>;
    using DyLoader = RowLoader<T, C, 0>;
    extern __shared__ __align__(16) unsigned char shared[];
    const int lanes = blockDim.x, groups = blockDim.y;
    const int lane = threadIdx.x, group = threadIdx.y;
    T* stages = reinterpret_cast<T*>(shared);
    constexpr int X_STAGE = XLoader::ELEMENTS, STAGE = X_STAGE + DyLoader::ELEMENTS;

    const int channel = blockIdx.x % tiles.channel_tiles * lanes;
    const int split = blockIdx.x / tiles.channel_tiles;
    const int splits = gridDim.x / tiles.channel_tiles;
    const int per_image = tiles.segments * tiles.column_tiles;
    const int64_t visits = shape.batch * per_image;

    // Between rows, sums[i] belong to tap K - 1 - i. They rotate, because the rows of dy have fixed
    // places: the first product of each sum writes it to the next register.
    float sums[K][K], dy_sum = 0.f;
#pragma unroll
    for (int i = 0; i < K * K; ++i) sums[i / K][i % K] = 0.f;
    const auto turn = [&] {
#pragma unroll
        for (int j = 0; j < K; ++j) {
            const float saved = sums[K - 1][j];
#pragma unroll
            for (int i = K - 1; i > 0; --i) sums[i][j] = sums[i - 1][j];
            sums[0][j] = saved;
        }
    };

    for (int64_t visit = split; visit < visits; visit += splits) {
        const int64_t image = visit / per_image;
        const int tile = static_cast<int>(visit % per_image);
        const int column = tile % tiles.column_tiles * (groups * C);
        const int row_begin = tile / tiles.column_tiles * tiles.rows;
        const int row_end = min(row_begin + tiles.rows, shape.height);
        const int first = max(row_begin - PAD, 0), last = min(row_end + PAD, shape.height);
        __syncthreads();
        clear(stages, STAGES * STAGE);
        __syncthreads();
        XLoader x_loader(x, image, first, column, channel, shape);
        DyLoader dy_loader(dy, image, first + PAD, column, channel, shape);
        const auto load = [&](int r, T* to) {
            if (r < last) x_loader.load(to);
            if (r + PAD < row_end) dy_loader.load(to + X_STAGE);
            __pipeline_commit();
        };
        for (int i = 0; i < STAGES - 1; ++i) load(first + i, stages + i * STAGE);

        // Row h of dy is at (h - first - PAD) mod K. Load the rows that the first input row needs,
        // except the one that is loaded with it:
        float ring[K][C];
        const int columns =
            channel + lane < shape.channels ? min(C, shape.width - column - group * C) : 0;
#pragma unroll
        for (int i = 0; i < K; ++i) {
            const int h = first + i - (K - PAD);
            const bool inside = i >= K - PAD && h >= row_begin && h < row_end;
            const T* row = dy.data + image * dy.batch_stride + h * dy.row_stride +
                           (column + group * C) * dy.pixel_stride + channel + lane;
#pragma unroll
            for (int c = 0; c < C; ++c) {
                ring[i][c] = inside && c < columns ? to_float(row[c * dy.pixel_stride]) : 0.f;
                dy_sum += ring[i][c];
            }
        }

        int now = 0, place = 0;
        for (int r = first; r < last; ++r) {
            __pipeline_wait_prior(STAGES - 2);
            __syncthreads();
            const int free = now == 0 ? STAGES - 1 : now - 1;
            load(r + STAGES - 1, stages + free * STAGE);

            const T* x_row = stages + now * STAGE + group * (C + 1) * DEPTHWISE_LANES + lane;
            const T* dy_row = x_row + X_STAGE;
            const bool has_dy = r + PAD < row_end;
            const auto fill = [&](float (&pixels)[C]) {
                if (has_dy) {
#pragma unroll
                    for (int c = 0; c < C; ++c) {
                        pixels[c] = to_float(dy_row[c * DEPTHWISE_LANES]);
                        dy_sum += pixels[c];
                    }
                } else {
#pragma unroll
                    for (int c = 0; c < C; ++c) pixels[c] = 0.f;
                }
            };
#pragma unroll
            for (int i = 0; i < K; ++i)
                if (i == place) fill(ring[i]);

            float pixels[C + K - 1];
#pragma unroll
            for (int j = 0; j < C + K - 1; ++j)
                pixels[j] = to_float(x_row[(j + j / C) * DEPTHWISE_LANES]);
            float turned[K];
#pragma unroll
            for (int j = 0; j < K; ++j) turned[j] = sums[K - 1][j];
#pragma unroll
            for (int i = K - 1; i >= 0; --i)
#pragma unroll
                for (int j = 0; j < K; ++j) {
                    float sum = i > 0 ? sums[i - 1][j] : turned[j];
#pragma unroll
                    for (int c = 0; c < C; ++c) sum += ring[i][c] * pixels[c + j];
                    sums[i][j] = sum;
                }
            now = now == STAGES - 1 ? 0 : now + 1;
            place = place == K - 1 ? 0 : place + 1;
        }
        for (; place != 0; place = place == K - 1 ? 0 : place + 1) turn();
    }

    float* totals = reinterpret_cast<float*>(shared);
    for (int g = 0; g < groups; ++g) {
        __syncthreads();
        if (g != group) continue;
#pragma unroll
        for (int i = 0; i < K * K + 1; ++i) {
            const float sum = i < K * K ? sums[K - 1 - i / K][i % K] : dy_sum;
            float& total = totals[i * DEPTHWISE_LANES + lane];
            total = g == 0 ? sum : total + sum;
        }
    }
    __syncthreads();
    if (channel + lane < shape.channels)
        for (int i = group; i < K * K + 1; i += groups)
            partial[(int64_t{split} * (K * K + 1) + i) * shape.channels + channel + lane] =
                totals[i * DEPTHWISE_LANES + lane];
}

// Any odd kernel and any strides: one thread per tap and channel, over every splits-th pixel.
//   partial [splits, k * k + 1, channels]
template <typename T>
__global__ void depthwise_conv2d_weight_any_kernel(Features<T> x, Features<T> dy,
                                                   float* __restrict__ partial,
                                                   DepthwiseShape shape, int64_t splits) {
    const int64_t taps = int64_t{shape.kernel} * shape.kernel;
    const int64_t pixels = shape.batch * shape.height * shape.width;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
         index < splits * (taps + 1) * shape.channels; index += step) {
        const int d = static_cast<int>(index % shape.channels);
        const int64_t tap = index / shape.channels % (taps + 1);
        const int down = static_cast<int>(tap / shape.kernel) - shape.kernel / 2;
        const int right = static_cast<int>(tap % shape.kernel) - shape.kernel / 2;
        float sum = 0.f;
        for (int64_t pixel = index / shape.channels / (taps + 1); pixel < pixels; pixel += splits) {
            const int64_t image = pixel / shape.width / shape.height;
            const int h = static_cast<int>(pixel / shape.width % shape.height);
            const int w = static_cast<int>(pixel % shape.width);
            const float g = to_float(
                dy.data[image * dy.batch_stride + h * dy.row_stride + w * dy.pixel_stride + d]);
            const int r = h + down, c = w + right;
            if (tap == taps)
                sum += g;
            else if (r >= 0 && r < shape.height && c >= 0 && c < shape.width)
                sum +=
                    g *
                    to_float(
                        x.data[image * x.batch_stride + r * x.row_stride + c * x.pixel_stride + d]);
        }
        partial[index] = sum;
    }
}

// Sums `partial` [splits, taps + 1, channels] over the splits.
//   dweight [channels, taps], dbias [channels], either null if not needed
constexpr int SUM_LANES = 32, SUM_PARTS = 8;

static __global__ void __launch_bounds__(SUM_LANES* SUM_PARTS)
    depthwise_conv2d_weight_sum_kernel(const float* __restrict__ partial, int64_t splits,
                                       int64_t taps, int channels, float* __restrict__ dweight,
                                       float* __restrict__ dbias) {
    extern __shared__ __align__(16) unsigned char shared[];
    float* parts = reinterpret_cast<float*>(shared);
    const int64_t count = (taps + 1) * channels;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * SUM_LANES + threadIdx.x;
    float sum = 0.f;
    if (index < count)
        for (int64_t split = threadIdx.y; split < splits; split += SUM_PARTS)
            sum += partial[split * count + index];
    parts[threadIdx.y * SUM_LANES + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || index >= count) return;
#pragma unroll
    for (int part = 1; part < SUM_PARTS; ++part) sum += parts[part * SUM_LANES + threadIdx.x];
    const int64_t tap = index / channels, d = index % channels;
    if (tap < taps) {
        if (dweight) dweight[d * taps + tap] = sum;
    } else if (dbias) {
        dbias[d] = sum;
    }
}

}  // namespace dimr_fast
