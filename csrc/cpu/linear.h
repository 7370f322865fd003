// Linear layers with packed weights.
#pragma once

#include <vector>

#include "kernels/linear.h"
#include "tensors.h"

namespace dimr_fast {

// The weights in a tensor that `dimr_fast::pack_linear` has made. Checks that its memory is as
// large as its first numbers say.
Weights packed_weights(const Tensor& packed);

// Runs all layers on the same rows, then on the next ones, on all threads. They have equally many.
void run_linear(const std::vector<Linear>& layers);

}  // namespace dimr_fast
