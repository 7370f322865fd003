#pragma once

#include <cstdint>

#include "../dtypes.h"
#include "../instruction_set.h"

namespace dimr_fast {

// An image tensor [batch, height, width, channels]; neighbouring channels are neighbours in memory.
struct Image {
    void* data;
    DType dtype;
    int64_t batch_stride, row_stride, pixel_stride;
};

struct DepthwiseConv2d {
    int64_t batch, height, width, channels, kernel;
    Image x;             // what is convolved; of the weight gradient, the input
    Image y;             // what comes out; of the weight gradient, the output's gradient
    const void* weight;  // [channels, kernel, kernel]
    const void* bias;    // [channels] or null
    DType weight_dtype;  // of weight and bias; products are taken in it, sums in fp32
    bool residual;       // add x to y
    bool flipped;        // turn the filters by half, as the input gradient does
    int64_t band;        // rows of a task
    int64_t group;       // blocks of channels of a task
    void* packed;        // the weights and biases of each block as the kernels read them
    float* partial;      // [batch, blocks, kernel² + 1, lanes] of the weight gradient
    float* weight_grad;  // [channels, kernel, kernel]
    float* bias_grad;    // [channels]

    int64_t bands() const { return (height + band - 1) / band; }
};

// A block is `depthwise_conv2d_lanes` channels, a group at best `depthwise_conv2d_group` blocks.
DIMR_FAST_DECLARE(int64_t depthwise_conv2d_lanes())
DIMR_FAST_DECLARE(int64_t depthwise_conv2d_group(const DepthwiseConv2d& p))
// Bytes of `packed`, and of the scratch of a thread; both are aligned to 64.
DIMR_FAST_DECLARE(int64_t depthwise_conv2d_packed(const DepthwiseConv2d& p))
DIMR_FAST_DECLARE(int64_t depthwise_conv2d_scratch(const DepthwiseConv2d& p))
// A task is one block: its weights and bias to `packed`.
DIMR_FAST_DECLARE(void depthwise_conv2d_pack(const DepthwiseConv2d& p, int64_t begin, int64_t end))
// A task is one group of one band of one image, groups fastest.
DIMR_FAST_DECLARE(void depthwise_conv2d(const DepthwiseConv2d& p, int64_t begin, int64_t end,
                                        void* scratch))
// A task is one group of one image, whose sums go to `partial`.
DIMR_FAST_DECLARE(void depthwise_conv2d_weight_grad(const DepthwiseConv2d& p, int64_t begin,
                                                    int64_t end, void* scratch))
// A task is one block: the images' sums, in order.
DIMR_FAST_DECLARE(void depthwise_conv2d_weight_sum(const DepthwiseConv2d& p, int64_t begin,
                                                   int64_t end))

}  // namespace dimr_fast
