// Device code of the depthwise convolution; does not depend on torch.
//
// A thread keeps one channel's filter in registers and moves down the rows of C neighbouring
// columns, with the partial sums of the K output rows that an input row contributes to. Every input
// row is copied once into shared memory, with zeros around the image, some rows before it is used.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <cstdint>

#include "cuda/depthwise_conv2d_tiles.h"

namespace dimr_fast {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
    return value;
}
template <>
__device__ inline __half from_float<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

// Features [batch, height, width, channels] with contiguous channels; strides in elements.
template <typename T>
struct Features {
    const T* data;
    int64_t batch_stride, row_stride, pixel_stride;
    bool vectors;  // each run of 16 bytes of channels is aligned to 16 bytes
};

// Rows in shared memory: the one in use and those being copied.
constexpr int STAGES = 4;

struct alignas(16) Vector {
    int words[4];
};

// Fills shared memory with zeros; positions outside the image stay zero.
template <typename T>
__device__ inline void clear(T* shared, int elements) {
    const int vectors = elements * sizeof(T) / sizeof(Vector), threads = blockDim.x * blockDim.y;
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < vectors; i += threads)
        reinterpret_cast<Vector*>(shared)[i] = Vector{};
}

// Starts to copy the filters of a block's channels; the caller commits and waits.
template <typename T>
__device__ inline void copy_filters(T* shared, const T* weight, int elements) {
    constexpr int VECTOR = sizeof(Vector) / sizeof(T);
    const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
    if (reinterpret_cast<uintptr_t>(weight) % sizeof(Vector) == 0 && elements % VECTOR == 0)
        for (int i = thread * VECTOR; i < elements; i += threads * VECTOR)
            __pipeline_memcpy_async(shared + i, weight + i, sizeof(Vector));
    else
        for (int i = thread; i < elements; i += threads) shared[i] = weight[i];
}

// Copies rows of a block's columns, and HALO more on either side, to shared memory, top down.
template <typename T, int C, int HALO>
class RowLoader {
  public:
    // An unused column after each C keeps the groups of a warp in different banks.
    __host__ __device__ static constexpr int slot(int column) { return column + column / C; }
    static constexpr int ELEMENTS =
        (DEPTHWISE_GROUPS * C + 2 * HALO + (DEPTHWISE_GROUPS * C + 2 * HALO - 1) / C) *
        DEPTHWISE_LANES;

    // `row`, `column` and `channel` are the block's first.
    __device__ RowLoader(const Features<T>& features, int64_t image, int row, int column,
                         int channel, const DepthwiseShape& shape)
        : next_(features.data + image * features.batch_stride + row * features.row_stride),
          row_stride_(features.row_stride),
          pixel_stride_(static_cast<int>(features.pixel_stride)),
          vectors_(features.vectors),
          column_(column - HALO),
          width_(shape.width),
          channel_(channel + static_cast<int>(threadIdx.x)),
          has_channel_(channel_ < shape.channels) {
        const int in_pixel = blockDim.x / VECTOR;
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            const int index = (i * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
            const int at = index / in_pixel, first = index % in_pixel * VECTOR;
            const int w = column_ + at, d = channel + first;
            const bool inside = at < columns() && w >= 0 && w < width_ && d < shape.channels;
            to_[i] = inside ? slot(at) * DEPTHWISE_LANES + first : -1;
            from_[i] = w * pixel_stride_ + d;
        }
    }

    // Starts to copy the next row; the caller commits and waits.
    __device__ void load(T* shared) {
        if (vectors_) {
#pragma unroll
            for (int i = 0; i < COPIES; ++i)
                if (to_[i] >= 0) __pipeline_memcpy_async(shared + to_[i], next_ + from_[i], 16);
        } else if (has_channel_) {
#pragma unroll 1
            for (int at = threadIdx.y; at < columns(); at += blockDim.y) {
                const int w = column_ + at;
                if (w >= 0 && w < width_)
                    shared[slot(at) * DEPTHWISE_LANES + threadIdx.x] =
                        next_[w * pixel_stride_ + channel_];
            }
        }
        next_ += row_stride_;
    }

  private:
    static constexpr int VECTOR = sizeof(Vector) / sizeof(T);
    static constexpr int COPIES = (C + 2 * HALO + VECTOR - 1) / VECTOR;

    __device__ int columns() const { return blockDim.y * C + 2 * HALO; }

    const T* next_;
    int64_t row_stride_;
    int pixel_stride_;
    bool vectors_;
    int column_, width_, channel_;
    bool has_channel_;
    int from_[COPIES], to_[COPIES];
};

// Blocks per multiprocessor; the compiler limits registers so that they fit.
constexpr int depthwise_blocks(int kernel) { return kernel <= 9 ? 3 : 2; }

template <typename T, int K, int C>
constexpr int depthwise_conv2d_fwd_shared() {
    return (STAGES * RowLoader<T, C, K / 2>::ELEMENTS + DEPTHWISE_LANES * K * K) * sizeof(T);
}

//   weight [channels, 1, K, K]; bias [channels] or null; y [batch, height, width, channels]
// `flip` rotates the filter by 180 degrees, which computes the input gradient from dy.
template <typename T, int K, int C>
__global__ void __launch_bounds__(DEPTHWISE_THREADS, depthwise_blocks(K))
    depthwise_conv2d_fwd_kernel(Features<T> x, const T* __restrict__ weight,
                                const T* __restrict__ bias, T* __restrict__ y, DepthwiseShape shape,
                                DepthwiseTiles tiles, bool residual, bool flip) {
    constexpr int PAD = K / 2;
    extern __shared__ __align__(16) unsigned char shared[];
    const int lanes = blockDim.x, groups = blockDim.y;
    const int lane = threadIdx.x, group = threadIdx.y;
    T* stages = reinterpret_cast<T*>(shared);
    constexpr int STAGE = RowLoader<T, C, PAD>::ELEMENTS;
    T* filters = stages + STAGES * STAGE;

    int block = blockIdx.x;
    const int channel = block % tiles.channel_tiles * lanes;
    block /= tiles.channel_tiles;
    const int column = block % tiles.column_tiles * (groups * C);
    block /= tiles.column_tiles;
    const int row_begin = block % tiles.segments * tiles.rows;
    const int row_end = min(row_begin + tiles.rows, shape.height);
    const int64_t image = block / tiles.segments;
    const int first = max(row_begin - PAD, 0), last = min(row_end + PAD, shape.height);

    copy_filters(filters, weight + int64_t{channel} * K * K,
                 min(lanes, shape.channels - channel) * K * K);
    clear(stages, STAGES * STAGE);
    __syncthreads();
    RowLoader<T, C, PAD> loader(x, image, first, column, channel, shape);
    for (int i = 0; i < STAGES - 1; ++i) {
        if (first + i < last) loader.load(stages + i * STAGE);
        __pipeline_commit();
    }
    __pipeline_wait_prior(STAGES - 2);
    __syncthreads();
    const bool has_channel = channel + lane < shape.channels;
    float filter[K][K];
#pragma unroll
    for (int i = 0; i < K * K; ++i)
        filter[i / K][i % K] =
            has_channel ? to_float(filters[lane * K * K + (flip ? K * K - 1 - i : i)]) : 0.f;
    if (residual) filter[PAD][PAD] += 1.f;
    const float start = bias && has_channel ? to_float(bias[channel + lane]) : 0.f;

    const int columns = has_channel ? min(C, shape.width - column - group * C) : 0;
    // The address of a row is the same for the whole block; an offset in a row fits in 32 bits.
    T* out = y + (image * shape.height + row_begin) * (int64_t{shape.width} * shape.channels);
    const unsigned offset = (column + group * C) * shape.channels + channel + lane;
    const auto store = [&](const float (&sums)[C]) {
        if (columns == C) {
#pragma unroll
            for (int c = 0; c < C; ++c) out[offset + c * shape.channels] = from_float<T>(sums[c]);
        } else {
#pragma unroll
            for (int c = 0; c < C; ++c)
                if (c < columns) out[offset + c * shape.channels] = from_float<T>(sums[c]);
        }
        out += int64_t{shape.width} * shape.channels;
    };

    // After input row r, sums[i] belong to output row r - PAD + i.
    float sums[K][C];
#pragma unroll
    for (int i = 0; i < K * C; ++i) sums[i / C][i % C] = start;
    int now = 0;
    for (int r = first; r < last; ++r) {
        __pipeline_wait_prior(STAGES - 2);
        __syncthreads();
        const int free = now == 0 ? STAGES - 1 : now - 1;
        if (r + STAGES - 1 < last) loader.load(stages + free * STAGE);
        __pipeline_commit();

        const T* row = stages + now * STAGE + group * (C + 1) * DEPTHWISE_LANES + lane;
        float pixels[C + K - 1];
#pragma unroll
        for (int j = 0; j < C + K - 1; ++j)
            pixels[j] = to_float(row[(j + j / C) * DEPTHWISE_LANES]);
        // The first product of each sum reads the register of the row above: the sums move up
        // without move instructions.
#pragma unroll
        for (int i = 0; i < K; ++i)
#pragma unroll
            for (int c = 0; c < C; ++c) {
                float sum = i + 1 < K ? sums[i + 1][c] : start;
#pragma unroll
                for (int j = 0; j < K; ++j) sum += filter[K - 1 - i][j] * pixels[c + j];
                sums[i][c] = sum;
            }
        if (r - PAD >= row_begin) store(sums[0]);
        now = now == STAGES - 1 ? 0 : now + 1;
    }
    // Output rows whose filter reaches beyond the image's last row.
#pragma unroll
    for (int i = 1; i <= PAD; ++i) {
        const int h = last - 1 - PAD + i;
        if (h >= row_begin && h < row_end) store(sums[i]);
    }
}

// Any odd kernel and any strides: one thread per output; neighbouring threads compute neighbouring
// channels.
template <typename T>
__global__ void depthwise_conv2d_fwd_any_kernel(Features<T> x, const T* __restrict__ weight,
                                                const T* __restrict__ bias, T* __restrict__ y,
                                                DepthwiseShape shape, bool residual, bool flip) {
    const int kernel = shape.kernel, pad = kernel / 2;
    const int64_t taps = int64_t{kernel} * kernel;
    const int64_t numel = shape.batch * shape.height * shape.width * shape.channels;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; index < numel;
         index += step) {
        const int d = static_cast<int>(index % shape.channels);
        const int64_t pixel = index / shape.channels;
        const int w = static_cast<int>(pixel % shape.width);
        const int h = static_cast<int>(pixel / shape.width % shape.height);
        const T* image = x.data + pixel / shape.width / shape.height * x.batch_stride + d;
        const T* filter = weight + d * taps;
        float sum = bias ? to_float(bias[d]) : 0.f;
        for (int i = max(0, pad - h); i < min(kernel, shape.height + pad - h); ++i)
            for (int j = max(0, pad - w); j < min(kernel, shape.width + pad - w); ++j) {
                const int64_t tap = int64_t{i} * kernel + j;
                sum +=
                    to_float(filter[flip ? taps - 1 - tap : tap]) *
                    to_float(image[(h + i - pad) * x.row_stride + (w + j - pad) * x.pixel_stride]);
            }
        if (residual) sum += to_float(image[h * x.row_stride + w * x.pixel_stride]);
        y[index] = from_float<T>(sum);
    }
}

}  // namespace dimr_fast
