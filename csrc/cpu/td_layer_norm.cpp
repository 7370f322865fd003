// dimr_fast::td_layer_norm_fwd and _bwd on the CPU. The arithmetic is in kernels/. How rows
// are split into tasks depends on the shape only, so results do not depend on the number of
// threads.

#include "kernels/td_layer_norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "rows.h"

namespace dimr_fast {
namespace {

// Tensors of one shape and dtype, whose concatenation along the last axis is a row.
struct Pieces {
    explicit Pieces(const std::vector<Tensor>& tensors) {
        STD_TORCH_CHECK(!tensors.empty(), "pieces: expected at least one");
        features.reserve(tensors.size());
        for (const Tensor& tensor : tensors) {
            features.emplace_back(tensor, "pieces");
            features.back().check_like(features[0], "pieces");
            STD_TORCH_CHECK(tensor.scalar_type() == tensors[0].scalar_type(),
                            "pieces: expected one dtype");
            views.push_back(features.back().view);
        }
        width = first().width * static_cast<int64_t>(tensors.size());
        sizes = sizes_of(tensors[0]);
        sizes.back() = width;
    }

    const Features& first() const { return features[0]; }

    std::vector<Features> features;
    std::vector<Rows> views;
    int64_t width;
    std::vector<int64_t> sizes;  // of the whole rows
};

std::tuple<Tensor, Tensor, Tensor, Tensor> td_layer_norm_fwd(const Tensor& weight,
                                                             const Tensor& bias,
                                                             const std::vector<Tensor>& tensors,
                                                             const std::optional<Tensor>& residual,
                                                             ScalarType dtype) {
    const Pieces pieces(tensors);
    const Features& first = pieces.first();
    const Tensor& x = tensors[0];
    const TimeValues weights(weight, first.images, pieces.width, "weight");
    const TimeValues biases(bias, first.images, pieces.width, "bias");
    std::optional<Features> added;
    Tensor summed = torch::stable::new_empty(x, {0}, dtype);
    if (residual) {
        STD_TORCH_CHECK(tensors.size() == 1, "residual: expected none with several pieces");
        added.emplace(*residual, "residual");
        added->check_like(first, "residual");
        summed = torch::stable::new_empty(x, x.sizes(),
                                          promoted(x.scalar_type(), residual->scalar_type()));
    }
    Tensor y = torch::stable::new_empty(x, pieces.sizes, dtype);
    Tensor mean = torch::stable::new_empty(x, {first.images, first.rows}, ScalarType::Float);
    Tensor rstd = torch::stable::new_empty(x, {first.images, first.rows}, ScalarType::Float);
    if (first.empty()) return {summed, y, mean, rstd};

    TDLayerNorm p{};
    p.chunks = chunks_in_cache(first, pieces.width);
    p.pieces = tensors.size();
    p.piece_width = first.width;
    p.x = p.sum = pieces.views.data();
    Rows sum;
    if (added) {
        p.residual = added->view;
        sum = rows_in(summed, first, first.width);
        p.sum = &sum;
    }
    p.y = rows_in(y, first, pieces.width);
    p.weight = weights.view;
    p.bias = biases.view;
    p.mean = mean.mutable_data_ptr<float>();
    p.rstd = rstd.mutable_data_ptr<float>();
    each_chunk(p.chunks, pieces.width,
               [&](int64_t begin, int64_t end) { DIMR_FAST_CHOOSE(td_layer_norm)(p, begin, end); });
    return {summed, y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> td_layer_norm_bwd(const Tensor& dy,
                                                     const std::optional<Tensor>& dsum,
                                                     const std::vector<Tensor>& tensors,
                                                     const Tensor& weight, const Tensor& bias,
                                                     const Tensor& mean, const Tensor& rstd,
                                                     bool needs_dx, bool needs_y) {
    const Pieces pieces(tensors);
    const Features &first = pieces.first(), grads(dy, "dy");
    const Tensor& x = tensors[0];
    STD_TORCH_CHECK(
        grads.images == first.images && grads.rows == first.rows && grads.width == pieces.width,
        "dy: its shape is not that of the rows");
    const TimeValues weights(weight, first.images, pieces.width, "weight");
    const TimeValues biases(bias, first.images, pieces.width, "bias");
    check_statistic(mean, first, "mean");
    check_statistic(rstd, first, "rstd");
    std::optional<Features> added;
    if (dsum) {
        STD_TORCH_CHECK(tensors.size() == 1, "dsum: expected none with several pieces");
        added.emplace(*dsum, "dsum");
        added->check_like(first, "dsum");
        STD_TORCH_CHECK(dsum->scalar_type() == x.scalar_type(), "dsum: expected the dtype of x");
    }
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.insert(sizes.begin(), tensors.size());
    if (!needs_dx) sizes = {0};
    Tensor dx = torch::stable::new_empty(x, sizes);
    Tensor y =
        needs_y ? torch::stable::new_empty(dy, dy.sizes()) : torch::stable::new_empty(dy, {0});
    const int64_t times = std::max(weights.times, biases.times);
    const std::vector<int64_t> both = {2, times, pieces.width};
    if (first.empty()) return {dx, torch::stable::new_zeros(x, both, ScalarType::Float), y};
    Tensor total = torch::stable::new_empty(x, both, ScalarType::Float);

    TDLayerNormGrad p{};
    p.chunks = chunks_to_sum(first);
    p.pieces = tensors.size();
    p.piece_width = first.width;
    p.dy = grads.view;
    if (added) p.dsum = added->view;
    if (needs_y) p.y = rows_in(y, first, pieces.width);
    p.x = pieces.views.data();
    p.dx = needs_dx ? dx.mutable_data_ptr() : nullptr;
    p.weight = weights.view;
    p.bias = biases.view;
    p.mean = mean.const_data_ptr<float>();
    p.rstd = rstd.const_data_ptr<float>();
    const int64_t partials = p.chunks.images * p.chunks.chunks;
    const Scratch partial({2, p.chunks.images, p.chunks.chunks, pieces.width, sizeof(float)});
    p.partial = static_cast<float*>(partial.data());
    each_chunk(p.chunks, pieces.width, [&](int64_t begin, int64_t end) {
        DIMR_FAST_CHOOSE(td_layer_norm_grad)(p, begin, end);
    });
    sum_partials(p.partial, total.mutable_data_ptr<float>(), 2 * times, partials / times,
                 pieces.width);
    return {dx, total, y};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dimr_fast, CPU, m) {
    m.impl("td_layer_norm_fwd", TORCH_BOX(&td_layer_norm_fwd));
    m.impl("td_layer_norm_bwd", TORCH_BOX(&td_layer_norm_bwd));
}

}  // namespace dimr_fast
