// dimr_fast::weight_gradient on the CPU. The arithmetic is in kernels/. How rows are split into
// tasks depends on the shape only, so results do not depend on the number of threads.

#include "kernels/weight_gradient.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "tensors.h"

namespace dimr_fast {
namespace {

// Returns `value`, or a contiguous copy if its columns are not adjacent.
Tensor checked_rows(const Tensor& value, const char* name) {
    STD_TORCH_CHECK(
        value.dim() == 2 && value.is_cpu() && value.scalar_type() == ScalarType::BFloat16, name,
        ": expected bfloat16 [N, D] on the CPU");
    return value.size(1) <= 1 || value.stride(1) == 1 ? value : torch::stable::contiguous(value);
}

const BFloat16* data_of(const Tensor& value) {
    return static_cast<const BFloat16*>(value.const_data_ptr());
}

// Writes the gradient of the weight for one input, and of the bias if `dbias` is not null.
void write_gradient(const Tensor& dy, const Tensor& x, float* dweight, int64_t dweight_stride,
                    float* dbias) {
    constexpr int64_t MOST_CHUNKS = 16, LEAST_ROWS = 1024;
    WeightGradient p{};
    p.rows = dy.size(0);
    p.height = dy.size(1);
    p.width = x.size(1);
    p.dy = data_of(dy);
    p.x = data_of(x);
    p.dy_stride = dy.stride(0);
    p.x_stride = x.stride(0);
    p.chunks = std::clamp<int64_t>(p.rows / LEAST_ROWS, 1, MOST_CHUNKS);
    p.chunk = (p.rows + p.chunks - 1) / p.chunks;
    p.blocks = (p.height + WEIGHT_GRADIENT_BLOCK - 1) / WEIGHT_GRADIENT_BLOCK;
    const int64_t width = DIMR_FAST_CHOOSE(padded_width)(p.width), tasks = p.chunks * p.blocks;
    constexpr int64_t SIZE = sizeof(float) * WEIGHT_GRADIENT_BLOCK;
    const Scratch partial({tasks, width, SIZE}), bias_partial({tasks, SIZE});
    p.partial = static_cast<float*>(partial.data());
    if (dbias) p.bias_partial = static_cast<float*>(bias_partial.data());
    p.dweight = dweight;
    p.dweight_stride = dweight_stride;
    p.dbias = dbias;
    const int64_t bytes = DIMR_FAST_CHOOSE(weight_gradient_scratch)(p);
    parallel(tasks, p.chunk * width, [&](int64_t begin, int64_t end) {
        const Scratch scratch({bytes});
        DIMR_FAST_CHOOSE(weight_gradient)(p, begin, end, scratch.data());
    });
    parallel(p.height, p.chunks * width / 8, [&](int64_t begin, int64_t end) {
        DIMR_FAST_CHOOSE(weight_gradient_sum)(p, begin, end);
    });
}

// The gradients in fp32 of a linear layer's weight [D, Σd] and bias [D], from that of its result,
// dy [N, D], and its inputs, each [N, d].
std::tuple<Tensor, Tensor> weight_gradient(const Tensor& gradient,
                                           const std::vector<Tensor>& given) {
    const Tensor dy = checked_rows(gradient, "dy");
    std::vector<Tensor> inputs;
    int64_t width = 0;
    for (const Tensor& value : given) {
        const Tensor& x = inputs.emplace_back(checked_rows(value, "inputs"));
        STD_TORCH_CHECK(x.size(0) == dy.size(0), "inputs: expected ", dy.size(0), " rows, got ",
                        x.size(0));
        width += x.size(1);
    }
    STD_TORCH_CHECK(width > 0, "inputs: expected at least one column");
    const std::optional<ScalarType> wide = ScalarType::Float;
    const std::vector<int64_t> sizes = {dy.size(1), width}, bias_sizes = {dy.size(1)};
    if (dy.size(0) == 0 || dy.size(1) == 0)
        return {torch::stable::new_zeros(dy, sizes, wide),
                torch::stable::new_zeros(dy, bias_sizes, wide)};
    Tensor dweight = torch::stable::new_empty(dy, sizes, wide);
    Tensor dbias = torch::stable::new_empty(dy, bias_sizes, wide);
    float* bias = dbias.mutable_data_ptr<float>();
    int64_t column = 0;
    for (const Tensor& x : inputs) {
        if (x.size(1) == 0) continue;
        write_gradient(dy, x, dweight.mutable_data_ptr<float>() + column, width, bias);
        bias = nullptr;  // the same for every input
        column += x.size(1);
    }
    return {dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dimr_fast, CPU, m) {
    m.impl("weight_gradient", TORCH_BOX(&weight_gradient));
}

}  // namespace dimr_fast
