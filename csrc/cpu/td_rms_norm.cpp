// dimr_fast::td_rms_norm_fwd and _bwd on the CPU. The arithmetic is in kernels/. How rows
// are split into tasks depends on the shape only, so results do not depend on the number of
// threads.

#include "kernels/td_rms_norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "rows.h"

namespace dimr_fast {
namespace {

std::tuple<Tensor, Tensor, Tensor> td_rms_norm_fwd(const Tensor& x,
                                                   const std::optional<Tensor>& residual,
                                                   const Tensor& scale, ScalarType dtype) {
    const Features features(x, "x");
    const TimeValues values(scale, features.images, features.width, "scale");
    std::optional<Features> added;
    Tensor y = torch::stable::new_empty(x, x.sizes(), dtype), summed;
    if (residual) {
        added.emplace(*residual, "residual");
        added->check_like(features, "residual");
        summed = torch::stable::new_empty(x, x.sizes(),
                                          promoted(x.scalar_type(), residual->scalar_type()));
    } else {
        summed = torch::stable::new_empty(x, {0}, dtype);
    }
    Tensor rms = torch::stable::new_empty(x, {features.images, features.rows}, ScalarType::Float);
    if (features.empty()) return {summed, y, rms};

    TDRMSNorm p{};
    p.chunks = chunks_in_cache(features, features.width);
    p.width = features.width;
    p.x = p.sum = features.view;
    if (added) {
        p.residual = added->view;
        p.sum = rows_in(summed, features, features.width);
    }
    p.y = rows_in(y, features, features.width);
    p.scale = values.view;
    p.rms = rms.mutable_data_ptr<float>();
    each_chunk(p.chunks, p.width,
               [&](int64_t begin, int64_t end) { DIMR_FAST_CHOOSE(td_rms_norm)(p, begin, end); });
    return {summed, y, rms};
}

std::tuple<Tensor, Tensor, Tensor> td_rms_norm_bwd(const Tensor& dy,
                                                   const std::optional<Tensor>& dsum,
                                                   const Tensor& x, const Tensor& scale,
                                                   const Tensor& rms, bool needs_y) {
    const Features features(x, "x"), grads(dy, "dy");
    grads.check_like(features, "dy");
    const TimeValues values(scale, features.images, features.width, "scale");
    check_statistic(rms, features, "rms");
    std::optional<Features> added;
    if (dsum) {
        added.emplace(*dsum, "dsum");
        added->check_like(features, "dsum");
        STD_TORCH_CHECK(dsum->scalar_type() == x.scalar_type(), "dsum: expected the dtype of x");
    }
    Tensor dx = torch::stable::new_empty(x, x.sizes());
    Tensor y =
        needs_y ? torch::stable::new_empty(dy, dy.sizes()) : torch::stable::new_empty(dy, {0});
    if (features.empty())
        return {dx, torch::stable::new_zeros(x, scale.sizes(), ScalarType::Float), y};
    Tensor dscale = torch::stable::new_empty(x, scale.sizes(), ScalarType::Float);

    TDRMSNormGrad p{};
    p.chunks = chunks_to_sum(features);
    p.width = features.width;
    p.dy = grads.view;
    if (added) p.dsum = added->view;
    p.x = features.view;
    p.dx = rows_in(dx, features, features.width);
    if (needs_y) p.y = rows_in(y, features, features.width);
    p.scale = values.view;
    p.rms = rms.const_data_ptr<float>();
    const int64_t partials = p.chunks.images * p.chunks.chunks;
    const Scratch partial({p.chunks.images, p.chunks.chunks, p.width, sizeof(float)});
    p.partial = static_cast<float*>(partial.data());
    each_chunk(p.chunks, p.width, [&](int64_t begin, int64_t end) {
        DIMR_FAST_CHOOSE(td_rms_norm_grad)(p, begin, end);
    });
    sum_partials(p.partial, dscale.mutable_data_ptr<float>(), values.times, partials / values.times,
                 p.width);
    return {dx, dscale, y};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dimr_fast, CPU, m) {
    m.impl("td_rms_norm_fwd", TORCH_BOX(&td_rms_norm_fwd));
    m.impl("td_rms_norm_bwd", TORCH_BOX(&td_rms_norm_bwd));
}

}  // namespace dimr_fast
