// dimr_fast::depthwise_conv2d_fwd on CUDA: checks, then launches on the current stream.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

#include "cuda/depthwise_conv2d.cuh"
#include "depthwise_conv2d.h"

namespace dimr_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int THREADS = 256;
constexpr int64_t MAX_BLOCKS = 1 << 20;

template <typename T>
void launch(const DepthwiseConv2dShape& s, const Tensor& x, const Tensor& weight,
            const std::optional<Tensor>& bias, const Tensor& y) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    const int64_t blocks = std::min((s.numel() + THREADS - 1) / THREADS, MAX_BLOCKS);
    depthwise_conv2d_fwd_kernel<T>
        <<<static_cast<unsigned>(blocks), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(
            static_cast<const T*>(x.const_data_ptr()),
            static_cast<const T*>(weight.const_data_ptr()),
            bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr,
            static_cast<T*>(y.mutable_data_ptr()), s.numel(), static_cast<int>(s.height),
            static_cast<int>(s.width), static_cast<int>(s.channels), static_cast<int>(s.kernel));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor depthwise_conv2d_fwd(const Tensor& x, const Tensor& weight,
                            const std::optional<Tensor>& bias) {
    const DepthwiseConv2dShape shape = check_depthwise_conv2d(x, weight, bias);
    constexpr int64_t limit = std::numeric_limits<int>::max() / 2;
    STD_TORCH_CHECK(shape.height <= limit && shape.width <= limit && shape.channels <= limit &&
                        shape.kernel * shape.kernel <= limit,
                    "x: a side is too long for this kernel");
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    Tensor y = torch::stable::empty_like(x);
    if (shape.numel() == 0) return y;
    switch (x.scalar_type()) {
        case ScalarType::Float:
            launch<float>(shape, x, weight, bias, y);
            break;
        case ScalarType::BFloat16:
            launch<__nv_bfloat16>(shape, x, weight, bias, y);
            break;
        case ScalarType::Half:
            launch<__half>(shape, x, weight, bias, y);
            break;
        default:
            STD_TORCH_CHECK(false, "x: expected float32, bfloat16 or float16");
    }
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dimr_fast, CUDA, m) {
    m.impl("depthwise_conv2d_fwd", TORCH_BOX(&depthwise_conv2d_fwd));
}

}  // namespace dimr_fast
