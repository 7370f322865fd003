// Device code of the depthwise convolution; knows nothing of torch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

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

// One thread an output, neighbouring threads on neighbouring channels.
//   x, y   [batch, height, width, channels]
//   weight [channels, 1, kernel, kernel]
//   bias   [channels] or null
template <typename T>
__global__ void depthwise_conv2d_fwd_kernel(const T* __restrict__ x, const T* __restrict__ weight,
                                            const T* __restrict__ bias, T* __restrict__ y,
                                            int64_t numel, int height, int width, int channels,
                                            int kernel) {
    const int pad = kernel / 2;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; index < numel;
         index += step) {
        const int c = static_cast<int>(index % channels);
        const int64_t pixel = index / channels;
        const int w = static_cast<int>(pixel % width);
        const int h = static_cast<int>(pixel / width % height);
        const T* image = x + (pixel - static_cast<int64_t>(h) * width - w) * channels;
        const T* factors = weight + static_cast<int64_t>(c) * kernel * kernel;
        float sum = bias ? to_float(bias[c]) : 0.f;
        for (int i = max(0, pad - h); i < min(kernel, height + pad - h); ++i)
            for (int j = max(0, pad - w); j < min(kernel, width + pad - w); ++j) {
                const int64_t source = static_cast<int64_t>(h + i - pad) * width + (w + j - pad);
                sum += to_float(factors[i * kernel + j]) * to_float(image[source * channels + c]);
            }
        y[index] = from_float<T>(sum);
    }
}

}  // namespace dimr_fast
