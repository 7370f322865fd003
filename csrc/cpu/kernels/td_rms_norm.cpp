// RMS norm with a time-dependent scale, fused with the residual add before it.
//
//     s = x + residual        r = 1 / (rms(s) + 1e-8)        y = s · r · scale
//
// and backward, with g = dy · scale and the gradient ds of the sum s:
//
//     dx = g·r − s · r² · mean(g·s) / rms + ds        dscale = Σ_rows dy · s · r
//
// Each pass covers a chunk of rows, which the second pass finds in the L1 cache. So each pass is
// compiled only for the dtypes that it reads and writes, and the rows of a chunk, even narrow ones,
// overlap in the pipeline.

#include "td_rms_norm.h"

#include "columns.h"

namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET {
namespace {

template <typename Input>
void measure(const TDRMSNorm& p, int64_t image, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const Input input(p.x, p.residual, p.sum, image, row);
        Vector squares[1] = {};
        accumulate(p.width, squares, [&](Vector(&sums)[1], int64_t c, auto lanes) {
            const Vector s = input(c, lanes);
            sums[0] += s * s;
        });
        p.rms[image * p.chunks.rows + row] = __builtin_sqrtf(sum(squares[0]) / p.width);
    }
}

template <typename S, typename Y>
void scale(const TDRMSNorm& p, int64_t image, int64_t first, int64_t last) {
    const float* scale = p.scale.data + image * p.scale.image_stride;
    for (int64_t row = first; row < last; ++row) {
        const S* s = row_of<const S>(p.sum, image, row);
        Y* y = row_of<Y>(p.y, image, row);
        const Vector r = broadcast(1 / (p.rms[image * p.chunks.rows + row] + 1e-8f));
        columns(p.width, [&](int64_t c, auto lanes) {
            store(y + c, load(s + c, lanes) * r * load(scale + c, lanes), lanes);
        });
    }
}

template <typename Y, typename X>
void differentiate(const TDRMSNormGrad& p, int64_t image, int64_t first, int64_t last) {
    const float* scale = p.scale.data + image * p.scale.image_stride;
    float* dscale = p.partial + (image * p.chunks.chunks + first / p.chunks.count) * p.width;
    columns(p.width, [&](int64_t c, auto lanes) { store(dscale + c, Vector{}, lanes); });
    for (int64_t row = first; row < last; ++row) {
        const Y* dy = row_of<const Y>(p.dy, image, row);
        const X* x = row_of<const X>(p.x, image, row);
        const X* dsum = p.dsum.data ? row_of<const X>(p.dsum, image, row) : nullptr;
        X* dx = row_of<X>(p.dx, image, row);
        Y* y = p.y.data ? row_of<Y>(p.y, image, row) : nullptr;
        Vector dot[1] = {};
        accumulate(p.width, dot, [&](Vector(&sums)[1], int64_t c, auto lanes) {
            sums[0] += load(dy + c, lanes) * load(scale + c, lanes) * load(x + c, lanes);
        });
        const float rms = p.rms[image * p.chunks.rows + row], inverse = 1 / (rms + 1e-8f);
        // On a row of zeros the rms has no gradient: the second term is zero.
        const float mean = sum(dot[0]) / p.width * inverse * inverse / (rms > 0 ? rms : 1);
        const Vector r = broadcast(inverse), pull = broadcast(mean);
        columns(p.width, [&](int64_t c, auto lanes) {
            const Vector s = load(x + c, lanes), g = load(dy + c, lanes) * r;
            const Vector w = load(scale + c, lanes);
            Vector ds = g * w - s * pull;
            if (dsum) ds += load(dsum + c, lanes);
            store(dx + c, ds, lanes);
            store(dscale + c, load(dscale + c, lanes) + g * s, lanes);
            if (y) store(y + c, s * r * w, lanes);
        });
    }
}

}  // namespace

void td_rms_norm(const TDRMSNorm& p, int64_t begin, int64_t end) {
    each_chunk(p.chunks, begin, end, [&](int64_t image, int64_t first, int64_t last) {
        with_input(p.x, p.residual,
                   [&]<typename Input>(Input*) { measure<Input>(p, image, first, last); });
        with_type(p.sum.dtype, [&]<typename S>(S*) {
            with_type(p.y.dtype, [&]<typename Y>(Y*) { scale<S, Y>(p, image, first, last); });
        });
    });
}

void td_rms_norm_grad(const TDRMSNormGrad& p, int64_t begin, int64_t end) {
    each_chunk(p.chunks, begin, end, [&](int64_t image, int64_t first, int64_t last) {
        with_type(p.dy.dtype, [&]<typename Y>(Y*) {
            with_type(p.x.dtype,
                      [&]<typename X>(X*) { differentiate<Y, X>(p, image, first, last); });
        });
    });
}

}  // namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET
