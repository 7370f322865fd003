#pragma once

#include <cstdint>

#include "../dtypes.h"
#include "../instruction_set.h"

namespace dimr_fast {

// An image tensor [batch, height, width, channels]; the last axis is contiguous.
struct Image {
    void* data;
    DType dtype;
    int64_t batch_stride, row_stride, pixel_stride;
};

struct DepthwiseConv2d {
    int64_t batch, height, width, channels, kernel;
    Image x;             // the input
    Image y;             // the output; for the weight gradient: dy
    const void* weight;  // [channels, kernel, kernel]
    const void* bias;    // [channels] or null
    DType weight_dtype;  // of weight and bias, and of the products; sums are fp32
    bool residual;       // add x to y
    bool flipped;        // rotate the filters by 180 degrees, for the input gradient
    int64_t band;        // rows of a task
    int64_t group;       // blocks of channels of a task
    void* packed;        // weights and biases of each block in the kernels' layout
    float* partial;      // [batch, blocks, kernel² + 1, lanes] of the weight gradient
    float* weight_grad;  // [channels, kernel, kernel]
    float* bias_grad;    // [channels]

    int64_t bands() const { return (height + band - 1) / band; }
};

// A block is `depthwise_conv2d_lanes` channels, a group at most `depthwise_conv2d_group` blocks.
DIMR_FAST_DECLARE(int64_t depthwise_conv2d_lanes())
DIMR_FAST_DECLARE(int64_t depthwise_conv2d_group(const DepthwiseConv2d& p))
// Bytes of `packed`, and of one thread's scratch; both are aligned to 64.
DIMR_FAST_DECLARE(int64_t depthwise_conv2d_packed(const DepthwiseConv2d& p))
DIMR_FAST_DECLARE(int64_t depthwise_conv2d_scratch(const DepthwiseConv2d& p))
// Copies weights and bias to `packed`; a task is one block.
DIMR_FAST_DECLARE(void depthwise_conv2d_pack(const DepthwiseConv2d& p, int64_t begin, int64_t end))
// A task is one group of one band of one image, groups fastest.
DIMR_FAST_DECLARE(void depthwise_conv2d(const DepthwiseConv2d& p, int64_t begin, int64_t end,
                                        void* scratch))
// Writes the sums of one image to `partial`; a task is one group of one image.
DIMR_FAST_DECLARE(void depthwise_conv2d_weight_grad(const DepthwiseConv2d& p, int64_t begin,
                                                    int64_t end, void* scratch))
// Adds the sums of all images in order; a task is one block.
DIMR_FAST_DECLARE(void depthwise_conv2d_weight_sum(const DepthwiseConv2d& p, int64_t begin,
                                                   int64_t end))

}  // namespace dimr_fast
