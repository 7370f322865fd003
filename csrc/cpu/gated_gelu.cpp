// dimr_fast::gated_gelu_fwd and _bwd on the CPU. The arithmetic is in kernels/.

#include "kernels/gated_gelu.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "rows.h"

namespace dimr_fast {
namespace {

std::vector<int64_t> sizes_of_result(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) % 2 == 0,
                    "x: expected an even last axis, 2 * hidden");
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.back() /= 2;
    return sizes;
}

// A single row becomes one image of one row.
Features features(const Tensor& x, const char* name) {
    return Features(x.dim() == 1 ? torch::stable::unsqueeze(x, 0) : x, name);
}

Tensor gated_gelu_fwd(const Tensor& x) {
    Tensor y = torch::stable::new_empty(x, sizes_of_result(x));
    const Features from = features(x, "x");
    if (from.empty()) return y;
    GatedGELU p{};
    p.hidden = from.width / 2;
    p.chunks = chunks_in_cache(from, p.hidden);
    p.x = from.view;
    p.y = rows_in(y, from, p.hidden);
    each_chunk(p.chunks, p.hidden,
               [&](int64_t begin, int64_t end) { DIMR_FAST_CHOOSE(gated_gelu)(p, begin, end); });
    return y;
}

std::tuple<Tensor, Tensor> gated_gelu_bwd(const Tensor& dy, const Tensor& x, bool needs_y) {
    STD_TORCH_CHECK(sizes_of(dy) == sizes_of_result(x), "dy: its shape is not that of the result");
    STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy: its dtype is not that of x");
    Tensor dx = torch::stable::new_empty(x, x.sizes());
    Tensor y =
        needs_y ? torch::stable::new_empty(dy, dy.sizes()) : torch::stable::new_empty(dy, {0});
    const Features from = features(x, "x"), grads = features(dy, "dy");
    if (from.empty()) return {dx, y};
    GatedGELUGrad p{};
    p.hidden = grads.width;
    p.chunks = chunks_in_cache(from, p.hidden);
    p.x = from.view;
    p.dy = grads.view;
    if (needs_y) p.y = rows_in(y, grads, p.hidden);
    p.dx = rows_in(dx, from, from.width);
    each_chunk(p.chunks, from.width, [&](int64_t begin, int64_t end) {
        DIMR_FAST_CHOOSE(gated_gelu_grad)(p, begin, end);
    });
    return {dx, y};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dimr_fast, CPU, m) {
    m.impl("gated_gelu_fwd", TORCH_BOX(&gated_gelu_fwd));
    m.impl("gated_gelu_bwd", TORCH_BOX(&gated_gelu_bwd));
}

}  // namespace dimr_fast
