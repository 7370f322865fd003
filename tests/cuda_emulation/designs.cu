// The forward designs that csrc/cuda/depthwise_conv2d.md compares with the shipped one: the same
// arithmetic for kernel 7, without tiles and bias. Compiled to count instructions, never run.

#include "cuda/depthwise_conv2d.cuh"

namespace dimr_fast {

constexpr int K = 7, PAD = 3;

// 8 channels of one column: a pixel is one load of 16 bytes, the filter stays in shared memory.
template <typename T>
__global__ void __launch_bounds__(DEPTHWISE_THREADS)
    vectors_kernel(const T* __restrict__ x, const T* __restrict__ weight, T* __restrict__ y,
                   int height, int width, int channels) {
    constexpr int V = 16 / sizeof(T);
    __shared__ float filters[K * K][8 * V];
    const int lane = threadIdx.x * V, column = blockIdx.y * blockDim.y + threadIdx.y;
    for (int i = threadIdx.y; i < K * K; i += blockDim.y)
        for (int v = 0; v < V; ++v)
            filters[i][lane + v] = to_float(weight[(blockIdx.x * 8 * V + lane + v) * K * K + i]);
    __syncthreads();
    const T* from = x + column * channels + blockIdx.x * 8 * V + lane;
    T* to = y + column * channels + blockIdx.x * 8 * V + lane;
    float sums[K][V] = {};
    for (int r = 0; r < height; ++r) {
#pragma unroll
        for (int j = 0; j < K; ++j) {
            alignas(16) T pixel[V] = {};
            if (column + j - PAD >= 0 && column + j - PAD < width)
                *reinterpret_cast<Vector*>(pixel) =
                    *reinterpret_cast<const Vector*>(from + (j - PAD) * channels);
#pragma unroll
            for (int i = 0; i < K; ++i)
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const float before = j > 0 ? sums[i][v] : i + 1 < K ? sums[i + 1][v] : 0.f;
                    sums[i][v] =
                        before + filters[(K - 1 - i) * K + j][lane + v] * to_float(pixel[v]);
                }
        }
        alignas(16) T out[V];
#pragma unroll
        for (int v = 0; v < V; ++v) out[v] = from_float<T>(sums[0][v]);
        if (r >= PAD) *reinterpret_cast<Vector*>(to) = *reinterpret_cast<Vector*>(out);
        from += width * channels;
        to += width * channels;
    }
}

// 2 channels of 4 columns, the filter in registers, pixels straight from global memory.
template <typename T>
__global__ void __launch_bounds__(DEPTHWISE_THREADS)
    pairs_kernel(const T* __restrict__ x, const T* __restrict__ weight, T* __restrict__ y,
                 int height, int width, int channels) {
    constexpr int C = 4;
    struct alignas(2 * sizeof(T)) Pair {
        T values[2];
    };
    const int channel = (blockIdx.x * blockDim.x + threadIdx.x) * 2;
    const int column = (blockIdx.y * blockDim.y + threadIdx.y) * C;
    float filter[K * K][2];
#pragma unroll
    for (int i = 0; i < K * K * 2; ++i)
        filter[i / 2][i % 2] = to_float(weight[(channel + i % 2) * K * K + i / 2]);
    const T* from = x + column * channels + channel;
    T* to = y + column * channels + channel;
    float sums[K][C][2] = {};
    for (int r = 0; r < height; ++r) {
        float pixels[C + K - 1][2];
#pragma unroll
        for (int j = 0; j < C + K - 1; ++j) {
            Pair pair = {};
            if (column + j - PAD >= 0 && column + j - PAD < width)
                pair = *reinterpret_cast<const Pair*>(from + (j - PAD) * channels);
            pixels[j][0] = to_float(pair.values[0]);
            pixels[j][1] = to_float(pair.values[1]);
        }
#pragma unroll
        for (int i = 0; i < K * C * 2; ++i) {
            const int row = i / (C * 2), c = i / 2 % C, v = i % 2;
            float sum = row + 1 < K ? sums[row + 1][c][v] : 0.f;
#pragma unroll
            for (int j = 0; j < K; ++j) sum += filter[(K - 1 - row) * K + j][v] * pixels[c + j][v];
            sums[row][c][v] = sum;
        }
        if (r >= PAD) {
#pragma unroll
            for (int c = 0; c < C; ++c) {
                const Pair pair = {from_float<T>(sums[0][c][0]), from_float<T>(sums[0][c][1])};
                if (column + c < width) *reinterpret_cast<Pair*>(to + c * channels) = pair;
            }
        }
        from += width * channels;
        to += width * channels;
    }
}

template __global__ void vectors_kernel(const __nv_bfloat16*, const __nv_bfloat16*, __nv_bfloat16*,
                                        int, int, int);
template __global__ void pairs_kernel(const __nv_bfloat16*, const __nv_bfloat16*, __nv_bfloat16*,
                                      int, int, int);
template __global__ void depthwise_conv2d_fwd_kernel<__nv_bfloat16, K, 8>(
    Features<__nv_bfloat16>, const __nv_bfloat16*, const __nv_bfloat16*, __nv_bfloat16*,
    DepthwiseShape, DepthwiseTiles, bool, bool);

}  // namespace dimr_fast
