// What C++ code that runs several operators in one call needs of each.
#pragma once

#include "kernels/attention.h"
#include "kernels/depthwise_conv2d.h"

namespace dimr_fast {

// Run a kernel on all threads. `splits`, `band`, `group` and `packed` need no values.
void run_attention(const Attention& p);
void run_depthwise_conv2d(const DepthwiseConv2d& p);

}  // namespace dimr_fast
