// dimr_fast::gated_gelu_fwd and _bwd on the CPU. The arithmetic is in kernels/.

#include "kernels/gated_gelu.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "tensors.h"

namespace dimr_fast {
namespace {

// Of an element, in multiply-adds.
constexpr int64_t COST = 24, GRAD_COST = 40;

int64_t check(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) % 2 == 0,
                    "x: expected an even last axis, 2 * hidden");
    return x.size(x.dim() - 1) / 2;
}

Tensor gated_gelu_fwd(const Tensor& x) {
    const int64_t hidden = check(x);
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = hidden;
    Tensor y = torch::stable::new_empty(x, shape);
    if (y.numel() == 0) return y;
    const Tensor source = with_rows(x);
    const Rows from = rows(source, "x"), to = rows(y, "y");
    parallel(from.size(), hidden * COST, [&](int64_t begin, int64_t end) {
        DIMR_FAST_CHOOSE(gated_gelu)(from, to, begin, end);
    });
    return y;
}

Tensor gated_gelu_bwd(const Tensor& dy, const Tensor& x) {
    const int64_t hidden = check(x);
    STD_TORCH_CHECK(dy.dim() == x.dim() && dy.numel() * 2 == x.numel(),
                    "dy: its shape is not that of the result");
    for (int64_t axis = 0; axis < x.dim(); ++axis)
        STD_TORCH_CHECK(dy.size(axis) == (axis < x.dim() - 1 ? x.size(axis) : hidden),
                        "dy: its shape is not that of the result");
    STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy: its dtype is not that of x");
    Tensor dx = torch::stable::new_empty(x, x.sizes());
    if (dx.numel() == 0) return dx;
    const Tensor source = with_rows(x), grad = with_rows(dy);
    const Rows from = rows(source, "x"), from_grad = rows(grad, "dy"), to = rows(dx, "dx");
    parallel(from.size(), hidden * GRAD_COST, [&](int64_t begin, int64_t end) {
        DIMR_FAST_CHOOSE(gated_gelu_grad)(from_grad, from, to, begin, end);
    });
    return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dimr_fast, CPU, m) {
    m.impl("gated_gelu_fwd", TORCH_BOX(&gated_gelu_fwd));
    m.impl("gated_gelu_bwd", TORCH_BOX(&gated_gelu_bwd));
}

}  // namespace dimr_fast
