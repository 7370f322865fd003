// Chooses and launches the kernels of the depthwise convolution; does not depend on torch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cuda/depthwise_conv2d.cuh"
#include "cuda/depthwise_conv2d_weight.cuh"

namespace dimr_fast {

// A GPU's stream and its number of multiprocessors.
struct Queue {
    cudaStream_t stream;
    int processors;
};

constexpr int64_t MAX_GRID = std::numeric_limits<int>::max();

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const Queue& queue, void (*kernel)(Parameters...), int64_t blocks, dim3 threads,
                   size_t shared, const Arguments&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = threads;
    config.dynamicSmemBytes = shared;
    config.stream = queue.stream;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Returns the blocks of 256 threads for a kernel that loops over `count` elements.
inline int64_t striding_blocks(const Queue& queue, int64_t count) {
    return std::min<int64_t>((count + 255) / 256, int64_t{queue.processors} * 32);
}

// Strides in elements. The stride of a dimension of size one is ignored.
template <typename T>
Features<T> make_features(const void* data, const DepthwiseShape& shape, int64_t batch_stride,
                          int64_t row_stride, int64_t pixel_stride) {
    Features<T> features{static_cast<const T*>(data), shape.batch > 1 ? batch_stride : 0,
                         shape.height > 1 ? row_stride : 0, shape.width > 1 ? pixel_stride : 0,
                         false};
    const int64_t together =
        shape.channels | features.batch_stride | features.row_stride | features.pixel_stride;
    features.vectors = reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                       together % static_cast<int64_t>(16 / sizeof(T)) == 0;
    return features;
}

// The tiled kernels compute offsets within a row in 32 bits.
template <typename T>
bool is_tiled(const Features<T>& features, const DepthwiseShape& shape) {
    const int64_t pixel = std::max<int64_t>(features.pixel_stride, shape.channels);
    return shape.kernel >= 3 && shape.kernel <= 11 &&
           pixel <= (MAX_GRID - shape.channels) / (shape.width + 64);
}

// Calls run.template operator()<k>() with the kernel size as a constant.
template <typename Run>
cudaError_t with_kernel(int kernel, const Run& run) {
    switch (kernel) {
        case 3:
            return run.template operator()<3>();
        case 5:
            return run.template operator()<5>();
        case 7:
            return run.template operator()<7>();
        case 9:
            return run.template operator()<9>();
        default:
            return run.template operator()<11>();
    }
}

// y = bias + conv(x, weight) (+ x); with `flip` the filter is rotated by 180 degrees.
template <typename T>
cudaError_t launch_fwd(const Queue& queue, const Features<T>& x, const T* weight, const T* bias,
                       T* y, const DepthwiseShape& shape, bool residual, bool flip) {
    const int64_t numel = shape.batch * shape.height * shape.width * shape.channels;
    if (numel == 0) return cudaSuccess;
    const DepthwiseTiles tiles = depthwise_fwd_tiles(shape, queue.processors);
    const int64_t blocks = shape.batch * tiles.per_image() * tiles.channel_tiles;
    if (is_tiled(x, shape) && blocks <= MAX_GRID)
        return with_kernel(shape.kernel, [&]<int K>() {
            constexpr int C = depthwise_columns(K);
            return launch(queue, depthwise_conv2d_fwd_kernel<T, K, C>, blocks,
                          dim3(tiles.lanes, tiles.groups), depthwise_conv2d_fwd_shared<T, K, C>(),
                          x, weight, bias, y, shape, tiles, residual, flip);
        });
    return launch(queue, depthwise_conv2d_fwd_any_kernel<T>, striding_blocks(queue, numel),
                  dim3(256), 0, x, weight, bias, y, shape, residual, flip);
}

// How the weight gradient is summed: the caller provides memory for splits * (k * k + 1) * channels
// floats. An empty input has no splits, and the sum is zero.
struct WeightSplits {
    bool tiled;
    DepthwiseTiles tiles;
    int64_t splits;
};

template <typename T>
WeightSplits weight_splits(const Queue& queue, const Features<T>& x, const Features<T>& dy,
                           const DepthwiseShape& shape) {
    const int64_t pixels = shape.batch * shape.height * shape.width;
    if (pixels == 0 || shape.channels == 0) return {};
    const DepthwiseTiles tiles = depthwise_weight_tiles(shape, queue.processors);
    const int64_t splits = depthwise_splits(shape, tiles, queue.processors);
    if (is_tiled(x, shape) && is_tiled(dy, shape) && splits * tiles.channel_tiles <= MAX_GRID)
        return {true, tiles, splits};
    const int64_t taps = int64_t{shape.kernel} * shape.kernel + 1;
    // At least a few splits: shorter sums have a smaller rounding error.
    const int64_t wanted =
        std::max<int64_t>(int64_t{queue.processors} * 2048 / (taps * shape.channels), 32);
    return {false, tiles, std::min<int64_t>({wanted, pixels, 1024})};
}

// dweight [channels, 1, k, k] and dbias [channels] in float, either null if not needed.
template <typename T>
cudaError_t launch_weight(const Queue& queue, const Features<T>& x, const Features<T>& dy,
                          float* partial, float* dweight, float* dbias, const DepthwiseShape& shape,
                          const WeightSplits& plan) {
    const DepthwiseTiles& tiles = plan.tiles;
    const int64_t taps = int64_t{shape.kernel} * shape.kernel;
    const int64_t sums = (taps + 1) * shape.channels;
    if (sums == 0) return cudaSuccess;
    cudaError_t error = cudaSuccess;
    if (plan.tiled)
        error = with_kernel(shape.kernel, [&]<int K>() {
            constexpr int C = depthwise_columns(K);
            return launch(queue, depthwise_conv2d_weight_kernel<T, K, C>,
                          plan.splits * tiles.channel_tiles, dim3(tiles.lanes, tiles.groups),
                          depthwise_conv2d_weight_shared<T, K, C>(), x, dy, partial, shape, tiles);
        });
    else if (plan.splits > 0)
        error = launch(queue, depthwise_conv2d_weight_any_kernel<T>,
                       striding_blocks(queue, plan.splits * sums), dim3(256), 0, x, dy, partial,
                       shape, plan.splits);
    if (error != cudaSuccess) return error;
    return launch(queue, depthwise_conv2d_weight_sum_kernel, (sums + SUM_LANES - 1) / SUM_LANES,
                  dim3(SUM_LANES, SUM_PARTS), SUM_LANES * SUM_PARTS * sizeof(float), partial,
                  plan.splits, taps, shape.channels, dweight, dbias);
}

}  // namespace dimr_fast
