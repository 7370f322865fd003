// dimr_fast::depthwise_conv2d_fwd and _bwd on CUDA: checks, then launches on the current stream.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>

#include "cuda/depthwise_conv2d_launch.cuh"
#include "depthwise_conv2d.h"

namespace dimr_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Queue current_queue(const Tensor& x) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    Queue queue{static_cast<cudaStream_t>(stream), 0};
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&queue.processors, cudaDevAttrMultiProcessorCount,
                                          x.get_device_index()));
    return queue;
}

// Calls run.template operator()<T>() with the C++ type of `dtype`.
template <typename Run>
void with_dtype(ScalarType dtype, const Run& run) {
    switch (dtype) {
        case ScalarType::Float:
            return run.template operator()<float>();
        case ScalarType::BFloat16:
            return run.template operator()<__nv_bfloat16>();
        case ScalarType::Half:
            return run.template operator()<__half>();
        default:
            STD_TORCH_CHECK(false, "x: expected float32, bfloat16 or float16");
    }
}

DepthwiseShape narrow(const DepthwiseConv2dShape& shape, const Tensor& x, const Tensor& weight) {
    STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight: its dtype is not that of x");
    constexpr int64_t limit = std::numeric_limits<int>::max() / 2;
    STD_TORCH_CHECK(shape.height <= limit && shape.width <= limit && shape.channels <= limit &&
                        shape.kernel <= limit,
                    "x: a side is too long for this kernel");
    return {shape.batch, static_cast<int>(shape.height), static_cast<int>(shape.width),
            static_cast<int>(shape.channels), static_cast<int>(shape.kernel)};
}

template <typename T>
Features<T> features_of(const Tensor& x, const DepthwiseShape& shape) {
    return make_features<T>(x.const_data_ptr(), shape, x.stride(0), x.stride(1), x.stride(2));
}

template <typename T>
const T* data_of(const Tensor& value) {
    return static_cast<const T*>(value.const_data_ptr());
}

Tensor depthwise_conv2d_fwd(const Tensor& x, const Tensor& weight,
                            const std::optional<Tensor>& bias, bool residual) {
    const DepthwiseConv2dShape sizes = check_depthwise_conv2d(x, weight, bias);
    const DepthwiseShape shape = narrow(sizes, x, weight);
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    Tensor y = torch::stable::new_empty(x, x.sizes());
    with_dtype(x.scalar_type(), [&]<typename T>() {
        STD_CUDA_CHECK(launch_fwd<T>(current_queue(x), features_of<T>(x, shape), data_of<T>(weight),
                                     bias ? data_of<T>(*bias) : nullptr,
                                     static_cast<T*>(y.mutable_data_ptr()), shape, residual,
                                     false));
    });
    return y;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_bwd(const Tensor& dy, const Tensor& x,
                                                        const Tensor& weight, bool residual,
                                                        bool needs_dx, bool needs_dweight,
                                                        bool needs_dbias) {
    const DepthwiseConv2dShape sizes = check_depthwise_conv2d_grad(dy, x, weight);
    const DepthwiseShape shape = narrow(sizes, x, weight);
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const auto floats = [&](std::initializer_list<int64_t> size) {
        return torch::stable::new_empty(x, size, ScalarType::Float);
    };
    Tensor dx =
        needs_dx ? torch::stable::new_empty(x, x.sizes()) : torch::stable::new_empty(x, {0});
    Tensor dweight =
        needs_dweight ? floats({sizes.channels, 1, sizes.kernel, sizes.kernel}) : floats({0});
    Tensor dbias = needs_dbias ? floats({sizes.channels}) : floats({0});
    with_dtype(x.scalar_type(), [&]<typename T>() {
        const Queue queue = current_queue(x);
        const Features<T> incoming = features_of<T>(dy, shape);
        if (needs_dx)
            STD_CUDA_CHECK(launch_fwd<T>(queue, incoming, data_of<T>(weight), nullptr,
                                         static_cast<T*>(dx.mutable_data_ptr()), shape, residual,
                                         true));
        if (!needs_dweight && !needs_dbias) return;
        const Features<T> features = features_of<T>(x, shape);
        const WeightSplits plan = weight_splits(queue, features, incoming, shape);
        Tensor partial = floats({plan.splits, sizes.kernel * sizes.kernel + 1, sizes.channels});
        STD_CUDA_CHECK(launch_weight<T>(
            queue, features, incoming, static_cast<float*>(partial.mutable_data_ptr()),
            needs_dweight ? static_cast<float*>(dweight.mutable_data_ptr()) : nullptr,
            needs_dbias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr, shape, plan));
    });
    return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dimr_fast, CUDA, m) {
    m.impl("depthwise_conv2d_fwd", TORCH_BOX(&depthwise_conv2d_fwd));
    m.impl("depthwise_conv2d_bwd", TORCH_BOX(&depthwise_conv2d_bwd));
}

}  // namespace dimr_fast
