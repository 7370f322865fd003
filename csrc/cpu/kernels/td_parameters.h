#pragma once

#include "../dtypes.h"
#include "../instruction_set.h"

namespace dimr_fast {

// A block: neighbouring columns of one parameter, at most so many.
constexpr int64_t TD_COLUMNS = 256;

struct TDColumns {
    const void *param0, *param1, *weight, *bias;  // each at the block's first column
    int64_t place;  // of the first column in the results of all parameters
    int64_t count;
};

struct TDParameters {
    const TDColumns* blocks;
    DType dtype;  // of the vectors and their gradients
    const float* tau;
    int64_t times, columns;
    void* values;  // [times, columns], or their gradient
    DType values_dtype;
    int64_t values_stride;  // from time to time
    void* grads;            // [4, columns]
};

// A task is one block.
DIMR_FAST_DECLARE(void td_parameters(const TDParameters& p, int64_t begin, int64_t end))
DIMR_FAST_DECLARE(void td_parameters_grad(const TDParameters& p, int64_t begin, int64_t end))

}  // namespace dimr_fast
