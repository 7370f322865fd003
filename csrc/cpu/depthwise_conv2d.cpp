// dimr_fast::depthwise_conv2d_fwd on the CPU.
//
// A task is one band of rows and one block of channels of one image. It copies the rows it reads to
// fp32 scratch with the zero padding written out, so that the arithmetic is one branch-free loop
// for every dtype, border and channel count. Each output is summed by one task in a fixed order:
// the result does not depend on the number of threads.

#include "depthwise_conv2d.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <vector>

// AVX2 and its fused multiply-add are chosen when the library is loaded; needs glibc's ifunc.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define DIMR_FAST_CLONES __attribute__((target_clones("arch=haswell", "default")))
#else
#define DIMR_FAST_CLONES
#endif

namespace dimr_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t BLOCK = 16;  // channels of a task
constexpr int64_t PIXELS = 4;  // outputs summed together: 8 independent AVX registers of sums
constexpr int64_t BAND = 8;    // rows of a task

// One block of channels of one pixel. Aligned, because a load across two cache lines costs double.
struct alignas(64) Pixel {
    float lane[BLOCK];
};

// Sums one row of outputs.
//   rows   [k, row_pixels], the first of the k rows of the scratch that this one reads
//   weight [k, k], bias [1]
//   out    [width], width a multiple of PIXELS
DIMR_FAST_CLONES void convolve_row(const Pixel* rows, const Pixel* weight, const Pixel* bias,
                                   Pixel* out, int64_t width, int64_t row_pixels, int64_t kernel) {
    typedef float Vector __attribute__((vector_size(32), may_alias));
    constexpr int64_t VECTORS = sizeof(Pixel) / sizeof(Vector);
    const auto* start = reinterpret_cast<const Vector*>(bias);
    for (int64_t w = 0; w < width; w += PIXELS) {
        Vector sum[PIXELS * VECTORS];
        for (int64_t n = 0; n < PIXELS * VECTORS; ++n) sum[n] = start[n % VECTORS];
        for (int64_t i = 0; i < kernel; ++i)
            for (int64_t j = 0; j < kernel; ++j) {
                const auto* x = reinterpret_cast<const Vector*>(rows + i * row_pixels + w + j);
                const auto* factor = reinterpret_cast<const Vector*>(weight + i * kernel + j);
                for (int64_t n = 0; n < PIXELS * VECTORS; ++n) sum[n] += factor[n % VECTORS] * x[n];
            }
        auto* y = reinterpret_cast<Vector*>(out + w);
        for (int64_t n = 0; n < PIXELS * VECTORS; ++n) y[n] = sum[n];
    }
}

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

template <typename T>
void run(const DepthwiseConv2dShape& s, const T* x, const T* weight, const T* bias, T* y) {
    const int64_t k = s.kernel, pad = k / 2;
    const int64_t blocks = round_up(s.channels, BLOCK) / BLOCK;
    const int64_t bands = round_up(s.height, BAND) / BAND;
    const int64_t out_pixels = round_up(s.width, PIXELS), row_pixels = out_pixels + k - 1;

    // [blocks, k, k] and [blocks], zero beyond the last channel
    std::vector<Pixel> factors(blocks * k * k, Pixel{}), start(blocks, Pixel{});
    for (int64_t c = 0; c < s.channels; ++c) {
        const int64_t block = c / BLOCK, lane = c % BLOCK;
        for (int64_t i = 0; i < k * k; ++i)
            factors[block * k * k + i].lane[lane] = static_cast<float>(weight[c * k * k + i]);
        if (bias) start[block].lane[lane] = static_cast<float>(bias[c]);
    }

    const auto tasks = [&](int64_t begin, int64_t end) {
        std::vector<Pixel> rows((BAND + k - 1) * row_pixels), out(out_pixels);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t block = task % blocks, band = task / blocks % bands;
            const int64_t image = task / blocks / bands;
            const int64_t c0 = block * BLOCK, lanes = std::min(BLOCK, s.channels - c0);
            const int64_t h0 = band * BAND, h1 = std::min(h0 + BAND, s.height);

            std::fill(rows.begin(), rows.end(), Pixel{});
            for (int64_t h = std::max<int64_t>(h0 - pad, 0); h < std::min(h1 + pad, s.height); ++h)
                for (int64_t w = 0; w < s.width; ++w) {
                    const T* from = x + ((image * s.height + h) * s.width + w) * s.channels + c0;
                    float* to = rows[(h - h0 + pad) * row_pixels + w + pad].lane;
                    for (int64_t c = 0; c < lanes; ++c) to[c] = static_cast<float>(from[c]);
                }
            for (int64_t h = h0; h < h1; ++h) {
                convolve_row(&rows[(h - h0) * row_pixels], &factors[block * k * k], &start[block],
                             out.data(), out_pixels, row_pixels, k);
                for (int64_t w = 0; w < s.width; ++w) {
                    T* to = y + ((image * s.height + h) * s.width + w) * s.channels + c0;
                    for (int64_t c = 0; c < lanes; ++c) to[c] = static_cast<T>(out[w].lane[c]);
                }
            }
        }
    };
    // a thread is not woken for less than about 50 microseconds of arithmetic
    const int64_t cost = std::min(BAND, s.height) * s.width * BLOCK * k * k;
    torch::stable::parallel_for(0, s.batch * bands * blocks, std::max<int64_t>(1, 1000000 / cost),
                                tasks);
}

Tensor depthwise_conv2d_fwd(const Tensor& x, const Tensor& weight,
                            const std::optional<Tensor>& bias) {
    const DepthwiseConv2dShape shape = check_depthwise_conv2d(x, weight, bias);
    Tensor y = torch::stable::empty_like(x);
    if (shape.numel() == 0) return y;
    const auto with = [&]<typename T>(T) {
        run<T>(shape, x.const_data_ptr<T>(), weight.const_data_ptr<T>(),
               bias ? bias->const_data_ptr<T>() : nullptr, y.mutable_data_ptr<T>());
    };
    switch (x.scalar_type()) {
        case ScalarType::Float:
            with(float{});
            break;
        case ScalarType::BFloat16:
            with(c10::BFloat16{});
            break;
        case ScalarType::Half:
            with(c10::Half{});
            break;
        default:
            STD_TORCH_CHECK(false, "x: expected float32, bfloat16 or float16");
    }
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dimr_fast, CPU, m) {
    m.impl("depthwise_conv2d_fwd", TORCH_BOX(&depthwise_conv2d_fwd));
}

}  // namespace dimr_fast
