// Packed weights of linear layers as tensors.
#pragma once

#include "kernels/linear.h"
#include "tensors.h"

namespace dimr_fast {

// The weights in a tensor that `dimr_fast::pack_linear` has made. Checks that its memory is as
// large as its first numbers say.
Weights packed_weights(const Tensor& packed);

}  // namespace dimr_fast
