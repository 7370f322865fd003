// dimr_fast::upsample_add_fwd and _bwd on the CPU. The arithmetic is in kernels/. How boxes
// are split into tasks depends on the shape only, so results do not depend on the number of
// threads.

#include "kernels/upsample_add.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "rows.h"

namespace dimr_fast {
namespace {

// Returns how many times larger `x` is than `projected`, in height and in width.
int64_t check_sizes(const Tensor& x, const Tensor& projected, const char* name) {
    STD_TORCH_CHECK(x.dim() == 4 && projected.dim() == 4, name,
                    " and projected: expected [B, H, W, D] and [B, h, w, q²·D]");
    const int64_t q = x.size(1) / std::max<int64_t>(1, projected.size(1));
    STD_TORCH_CHECK(projected.size(0) == x.size(0) && projected.size(1) * q == x.size(1) &&
                        projected.size(2) * q == x.size(2) &&
                        projected.size(3) == q * q * x.size(3),
                    "projected: its shape does not fit that of ", name);
    return q;
}

std::tuple<Tensor, Tensor, Tensor> upsample_add_fwd(const Tensor& x, const Tensor& projected,
                                                    const Tensor& weight, const Tensor& bias) {
    const int64_t q = check_sizes(x, projected, "x");
    const Features rows(x, "x"), boxes(projected, "projected");
    const TimeValues weights(weight, rows.images, rows.width, "weight");
    const TimeValues biases(bias, rows.images, rows.width, "bias");
    Tensor out =
        torch::stable::new_empty(x, x.sizes(), promoted(x.scalar_type(), projected.scalar_type()));
    Tensor mean = torch::stable::new_empty(x, {rows.images, rows.rows}, ScalarType::Float);
    Tensor rstd = torch::stable::new_empty(x, {rows.images, rows.rows}, ScalarType::Float);

    if (rows.empty()) return {out, mean, rstd};

    UpsampleAdd p{};
    p.chunks = chunks_in_cache(boxes, boxes.width);
    p.q = q;
    p.width = rows.width;
    p.boxes_in_width = projected.size(2);
    p.x = rows.view;
    p.projected = boxes.view;
    p.weight = weights.view;
    p.bias = biases.view;
    p.out = rows_in(out, rows, rows.width);
    p.mean = mean.mutable_data_ptr<float>();
    p.rstd = rstd.mutable_data_ptr<float>();
    each_chunk(p.chunks, boxes.width,
               [&](int64_t begin, int64_t end) { DIMR_FAST_CHOOSE(upsample_add)(p, begin, end); });
    return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> upsample_add_bwd(const Tensor& dout, const Tensor& projected,
                                                    const Tensor& weight, const Tensor& mean,
                                                    const Tensor& rstd, int64_t times) {
    const int64_t q = check_sizes(dout, projected, "dout");
    const Features rows(dout, "dout"), boxes(projected, "projected");
    const TimeValues weights(weight, rows.images, rows.width, "weight");
    STD_TORCH_CHECK(times == 1 || times == rows.images, "times: expected 1 or ", rows.images);
    check_statistic(mean, rows, "mean");
    check_statistic(rstd, rows, "rstd");
    const std::optional<ScalarType> wide = ScalarType::Float;
    const std::vector<int64_t> both = {2, times, rows.width}, segments = {boxes.width};
    Tensor dprojected = torch::stable::new_empty(projected, projected.sizes());
    if (rows.empty())
        return {dprojected, torch::stable::new_zeros(dout, both, wide),
                torch::stable::new_zeros(dout, segments, wide)};
    Tensor parameters = torch::stable::new_empty(dout, both, wide);
    Tensor total = torch::stable::new_empty(dout, segments, wide);

    UpsampleAddGrad p{};
    p.chunks = chunks_to_sum(boxes);
    p.q = q;
    p.width = rows.width;
    p.boxes_in_width = projected.size(2);
    p.dout = rows.view;
    p.projected = boxes.view;
    p.dprojected = rows_in(dprojected, boxes, boxes.width);
    p.weight = weights.view;
    p.mean = mean.const_data_ptr<float>();
    p.rstd = rstd.const_data_ptr<float>();
    const int64_t partials = p.chunks.images * p.chunks.chunks;
    const Scratch partial(
        {p.chunks.images, p.chunks.chunks, 2 * rows.width + boxes.width, sizeof(float)});
    p.partial = static_cast<float*>(partial.data());
    p.partial_sum = p.partial + 2 * partials * rows.width;
    each_chunk(p.chunks, boxes.width, [&](int64_t begin, int64_t end) {
        DIMR_FAST_CHOOSE(upsample_add_grad)(p, begin, end);
    });
    sum_partials(p.partial, parameters.mutable_data_ptr<float>(), 2 * times, partials / times,
                 rows.width);
    sum_partials(p.partial_sum, total.mutable_data_ptr<float>(), 1, partials, boxes.width);
    return {dprojected, parameters, total};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dimr_fast, CPU, m) {
    m.impl("upsample_add_fwd", TORCH_BOX(&upsample_add_fwd));
    m.impl("upsample_add_bwd", TORCH_BOX(&upsample_add_bwd));
}

}  // namespace dimr_fast
