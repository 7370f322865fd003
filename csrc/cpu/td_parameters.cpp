// dimr_fast::td_parameters_fwd and _bwd on the CPU. The arithmetic is in kernels/. One task
// sums a column's gradients in a fixed order, so results do not depend on the number of threads.

#include "kernels/td_parameters.h"

#include <torch/csrc/stable/library.h>

#include <array>

#include "rows.h"

namespace dimr_fast {
namespace {

using Vectors = std::vector<Tensor>;

// The cost of one value, in multiply-adds.
constexpr int64_t COST = 20, GRAD_COST = 30;

struct Model {
    Tensor tau;
    std::vector<Tensor> copies;  // of vectors that are not contiguous
    std::vector<TDColumns> blocks;
    TDParameters p{};

    Model(const Tensor& tau_, const std::array<const Vectors*, 4>& kinds)
        : tau(tau_.scalar_type() == ScalarType::Float && tau_.is_contiguous()
                  ? tau_
                  : torch::stable::contiguous(torch::stable::to(tau_, ScalarType::Float))) {
        const Vectors& first = *kinds[0];
        STD_TORCH_CHECK(tau.dim() == 1, "tau: expected [T]");
        STD_TORCH_CHECK(!first.empty(), "param0: expected at least one vector");
        for (const Vectors* kind : kinds)
            STD_TORCH_CHECK(kind->size() == first.size(),
                            "parameters: expected four lists of one length");
        const ScalarType dtype = first[0].scalar_type();
        p.dtype = dtype_of(first[0], "param0");
        p.tau = tau.const_data_ptr<float>();
        p.times = tau.size(0);
        for (size_t i = 0; i < first.size(); ++i) add(kinds, i, dtype);
        p.blocks = blocks.data();
    }

    void add(const std::array<const Vectors*, 4>& kinds, size_t i, ScalarType dtype) {
        const int64_t width = (*kinds[0])[i].numel();
        const char* starts[4];
        for (int kind = 0; kind < 4; ++kind) {
            const Tensor& vector = (*kinds[kind])[i];
            STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == width, "parameters[", i,
                            "]: expected four of one width");
            STD_TORCH_CHECK(vector.scalar_type() == dtype, "parameters[", i,
                            "]: its dtype is not that of the first");
            STD_TORCH_CHECK(vector.is_cpu(), "parameters[", i, "]: not on the device of tau");
            const bool adjacent = vector.stride(0) == 1 || width <= 1;
            if (!adjacent) copies.push_back(torch::stable::contiguous(vector));
            starts[kind] =
                static_cast<const char*>((adjacent ? vector : copies.back()).const_data_ptr());
        }
        const int64_t bytes = dtype == ScalarType::Float ? 4 : 2;
        for (int64_t column = 0; column < width; column += TD_COLUMNS) {
            const int64_t at = column * bytes;
            blocks.push_back({starts[0] + at, starts[1] + at, starts[2] + at, starts[3] + at,
                              p.columns + column, std::min(TD_COLUMNS, width - column)});
        }
        p.columns += width;
    }

    int64_t size() const { return static_cast<int64_t>(blocks.size()); }
};

Tensor td_parameters_fwd(const Tensor& tau, const Vectors& param0, const Vectors& param1,
                         const Vectors& weight, const Vectors& bias) {
    Model model(tau, {&param0, &param1, &weight, &bias});
    TDParameters& p = model.p;
    const ScalarType dtype = promoted(tau.scalar_type(), param0[0].scalar_type());
    Tensor values = torch::stable::new_empty(param0[0], {p.times, p.columns}, dtype);
    p.values = values.mutable_data_ptr();
    p.values_dtype = dtype_of(values, "values");
    p.values_stride = p.columns;
    parallel(model.size(), TD_COLUMNS * p.times * COST,
             [&](int64_t begin, int64_t end) { DIMR_FAST_CHOOSE(td_parameters)(p, begin, end); });
    return values;
}

Tensor td_parameters_bwd(const Tensor& dvalues, const Tensor& tau, const Vectors& param0,
                         const Vectors& param1, const Vectors& weight, const Vectors& bias) {
    Model model(tau, {&param0, &param1, &weight, &bias});
    TDParameters& p = model.p;
    STD_TORCH_CHECK(
        dvalues.dim() == 2 && dvalues.size(0) == p.times && dvalues.size(1) == p.columns,
        "dvalues: expected [", p.times, ", ", p.columns, "]");
    const bool adjacent = dvalues.stride(1) == 1 || p.columns <= 1;
    const Tensor from = adjacent ? dvalues : torch::stable::contiguous(dvalues);
    Tensor grads = torch::stable::new_empty(param0[0], {4, p.columns});
    p.values = const_cast<void*>(from.const_data_ptr());
    p.values_dtype = dtype_of(from, "dvalues");
    p.values_stride = from.stride(0);
    p.grads = grads.mutable_data_ptr();
    parallel(model.size(), TD_COLUMNS * p.times * GRAD_COST, [&](int64_t begin, int64_t end) {
        DIMR_FAST_CHOOSE(td_parameters_grad)(p, begin, end);
    });
    return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dimr_fast, CPU, m) {
    m.impl("td_parameters_fwd", TORCH_BOX(&td_parameters_fwd));
    m.impl("td_parameters_bwd", TORCH_BOX(&td_parameters_bwd));
}

}  // namespace dimr_fast
