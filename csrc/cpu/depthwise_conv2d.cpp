// dimr_fast::depthwise_conv2d_fwd and _bwd on the CPU. The arithmetic is in kernels/. One task
// sums each output in a fixed order, so results do not depend on the number of threads.

#include "depthwise_conv2d.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "operators.h"
#include "tensors.h"

namespace dimr_fast {
namespace {

constexpr int64_t ENOUGH_TASKS = 8;

Image image(const Tensor& tensor, const char* name) {
    return {const_cast<void*>(tensor.const_data_ptr()), dtype_of(tensor, name), tensor.stride(0),
            tensor.stride(1), tensor.stride(2)};
}

DepthwiseConv2d describe(const DepthwiseConv2dShape& s, const Tensor& x, const Tensor& weight,
                         const Tensor& y) {
    DepthwiseConv2d p{};
    p.batch = s.batch;
    p.height = s.height;
    p.width = s.width;
    p.channels = s.channels;
    p.kernel = s.kernel;
    p.x = image(x, "x");
    p.y = image(y, "y");
    p.weight = weight.const_data_ptr();
    p.weight_dtype = dtype_of(weight, "weight");
    STD_TORCH_CHECK(p.weight_dtype == p.x.dtype || p.x.dtype == DType::FLOAT32,
                    "weight: expected the dtype of x, or x in float32");
    p.band = s.height;
    return p;
}

// Returns the instruction set to use: shorter vectors for few channels, which would leave most
// lanes of longer ones empty.
InstructionSet instructions(const DepthwiseConv2d& p) {
    const int64_t rest = p.channels % 16;
    const bool half_empty = p.weight_dtype != DType::BFLOAT16 && rest > 0 && rest <= 8;
    return half_empty ? std::min(instruction_set(), InstructionSet::AVX2) : instruction_set();
}
#define CHOOSE(function) DIMR_FAST_CHOOSE_FOR(instructions(p), function)

int64_t blocks(const DepthwiseConv2d& p) {
    const int64_t lanes = CHOOSE(depthwise_conv2d_lanes)();
    return (p.channels + lanes - 1) / lanes;
}

int64_t groups(const DepthwiseConv2d& p) { return (blocks(p) + p.group - 1) / p.group; }

int64_t cost(const DepthwiseConv2d& p) { return p.group * p.band * p.width * p.kernel * p.kernel; }

}  // namespace

void run_depthwise_conv2d(const DepthwiseConv2d& given) {
    DepthwiseConv2d p = given;
    p.group = std::min(blocks(p), CHOOSE(depthwise_conv2d_group)(p));
    // Tasks are to keep a handful of threads busy. Bands repeat the rows around them, so they are
    // not to be low; where there are still too few, smaller groups.
    const int64_t most = std::max<int64_t>(1, p.height / 8);
    const int64_t bands = std::clamp<int64_t>(ENOUGH_TASKS / (p.batch * groups(p)), 1, most);
    p.band = (p.height + bands - 1) / bands;
    while (p.group > 1 && p.batch * groups(p) * p.bands() < ENOUGH_TASKS) --p.group;
    const Scratch packed({CHOOSE(depthwise_conv2d_packed)(p)});
    p.packed = packed.data();
    parallel(blocks(p), 16 * p.kernel * p.kernel,
             [&](int64_t begin, int64_t end) { CHOOSE(depthwise_conv2d_pack)(p, begin, end); });
    const int64_t bytes = CHOOSE(depthwise_conv2d_scratch)(p);
    parallel(p.batch * groups(p) * p.bands(), cost(p), [&](int64_t begin, int64_t end) {
        const Scratch scratch({bytes});
        CHOOSE(depthwise_conv2d)(p, begin, end, scratch.data());
    });
}

namespace {

Tensor depthwise_conv2d_fwd(const Tensor& x, const Tensor& weight,
                            const std::optional<Tensor>& bias, bool residual) {
    const DepthwiseConv2dShape shape = check_depthwise_conv2d(x, weight, bias);
    Tensor y = torch::stable::new_empty(x, x.sizes());
    DepthwiseConv2d p = describe(shape, x, weight, y);
    if (shape.numel() == 0) return y;
    p.bias = bias ? bias->const_data_ptr() : nullptr;
    p.residual = residual;
    run_depthwise_conv2d(p);
    return y;
}

void weight_gradients(DepthwiseConv2d p, const Tensor& dweight, const Tensor& dbias) {
    const int64_t lanes = CHOOSE(depthwise_conv2d_lanes)();
    const int64_t sums = p.kernel * p.kernel + 1;
    const Scratch partial({p.batch, blocks(p), sums, lanes, sizeof(float)});
    p.partial = static_cast<float*>(partial.data());
    p.weight_grad = dweight.mutable_data_ptr<float>();
    p.bias_grad = dbias.mutable_data_ptr<float>();
    p.group = std::min(blocks(p), CHOOSE(depthwise_conv2d_group)(p));
    while (p.group > 1 && p.batch * groups(p) < ENOUGH_TASKS) --p.group;
    const int64_t bytes = CHOOSE(depthwise_conv2d_scratch)(p);
    parallel(p.batch * groups(p), cost(p), [&](int64_t begin, int64_t end) {
        const Scratch scratch({bytes});
        CHOOSE(depthwise_conv2d_weight_grad)(p, begin, end, scratch.data());
    });
    parallel(blocks(p), p.batch * sums, [&](int64_t begin, int64_t end) {
        CHOOSE(depthwise_conv2d_weight_sum)(p, begin, end);
    });
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_bwd(const Tensor& dy, const Tensor& x,
                                                        const Tensor& weight, bool residual,
                                                        bool needs_dx, bool needs_dweight,
                                                        bool needs_dbias) {
    const DepthwiseConv2dShape shape = check_depthwise_conv2d_grad(dy, x, weight);
    const int64_t d = shape.channels, k = shape.kernel;
    Tensor dx =
        needs_dx ? torch::stable::new_empty(x, x.sizes()) : torch::stable::new_empty(x, {0});
    const bool parameters = needs_dweight || needs_dbias;
    const std::optional<ScalarType> wide = ScalarType::Float;
    Tensor none = torch::stable::new_empty(x, {0}, wide);
    Tensor dweight = parameters ? torch::stable::new_zeros(x, {d, 1, k, k}, wide) : none;
    Tensor dbias = parameters ? torch::stable::new_zeros(x, {d}, wide) : none;
    if (shape.numel() > 0 && needs_dx) {
        DepthwiseConv2d p = describe(shape, dy, weight, dx);
        p.residual = residual;
        p.flipped = true;
        run_depthwise_conv2d(p);
    }
    if (shape.numel() > 0 && parameters)
        weight_gradients(describe(shape, x, weight, dy), dweight, dbias);
    return {dx, needs_dweight ? dweight : none, needs_dbias ? dbias : none};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dimr_fast, CPU, m) {
    m.impl("depthwise_conv2d_fwd", TORCH_BOX(&depthwise_conv2d_fwd));
    m.impl("depthwise_conv2d_bwd", TORCH_BOX(&depthwise_conv2d_bwd));
}

}  // namespace dimr_fast
