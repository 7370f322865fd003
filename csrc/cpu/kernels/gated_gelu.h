#pragma once

#include "../instruction_set.h"
#include "../rows.h"

namespace dimr_fast {

// A task is one row of x. Rows `y` and, of the gradient, `dx` have a stride like any others.
DIMR_FAST_DECLARE(void gated_gelu(const Rows& x, const Rows& y, int64_t begin, int64_t end))
DIMR_FAST_DECLARE(void gated_gelu_grad(const Rows& dy, const Rows& x, const Rows& dx, int64_t begin,
                                       int64_t end))

}  // namespace dimr_fast
