// Layer norm with a time-dependent scale and shift, over rows that may consist of pieces.
//
//     s = x + residual      n = (s − mean(s)) · rstd      rstd = 1 / sqrt(var(s) + 1e-5)
//     y = n · weight + bias
//
// and backward, with g = dy · weight and the gradient ds of the sum s:
//
//     dx = rstd · (g − mean(g) − n · mean(g·n)) + ds    dweight = Σ_rows dy · n    dbias = Σ_rows
//     dy
//
// The variance is the mean of squared deviations from the mean, in a separate pass: it stays
// accurate if the mean is far larger than the deviation. Passes cover chunks of rows, which later
// passes find in the L1 cache, as in td_rms_norm.cpp.

#include "td_layer_norm.h"

#include "columns.h"

namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET {
namespace {

template <typename Input>
void add_and_average(const TDLayerNorm& p, int64_t image, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        Vector total[1] = {};
        for (int64_t i = 0; i < p.pieces; ++i) {
            const Input input(p.x[i], p.residual, p.sum[i], image, row);
            accumulate(p.piece_width, total, [&](Vector(&sums)[1], int64_t c, auto lanes) {
                sums[0] += input(c, lanes);
            });
        }
        p.mean[image * p.chunks.rows + row] = sum(total[0]) / (p.pieces * p.piece_width);
    }
}

template <typename S>
void deviate(const TDLayerNorm& p, int64_t image, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const float mean = p.mean[image * p.chunks.rows + row];
        Vector total[2] = {};
        for (int64_t i = 0; i < p.pieces; ++i) {
            const S* s = row_of<const S>(p.sum[i], image, row);
            accumulate(p.piece_width, total, [&](Vector(&sums)[2], int64_t c, auto lanes) {
                const Vector centred = keep(load(s + c, lanes) - mean, lanes);
                sums[0] += centred;
                sums[1] += centred * centred;
            });
        }
        // The error of the mean, from rounding a long sum of large numbers.
        const float lost = sum(total[0]) / (p.pieces * p.piece_width);
        const float variance = sum(total[1]) / (p.pieces * p.piece_width) - lost * lost;
        p.mean[image * p.chunks.rows + row] = mean + lost;
        p.rstd[image * p.chunks.rows + row] = 1 / __builtin_sqrtf(variance + 1e-5f);
    }
}

template <typename S, typename Y>
void scale_and_shift(const TDLayerNorm& p, int64_t image, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const float mean = p.mean[image * p.chunks.rows + row];
        const float rstd = p.rstd[image * p.chunks.rows + row];
        for (int64_t i = 0; i < p.pieces; ++i) {
            const int64_t offset = i * p.piece_width;
            const float* weight = p.weight.data + image * p.weight.image_stride + offset;
            const float* bias = p.bias.data + image * p.bias.image_stride + offset;
            const S* s = row_of<const S>(p.sum[i], image, row);
            Y* y = row_of<Y>(p.y, image, row) + offset;
            columns(p.piece_width, [&](int64_t c, auto lanes) {
                const Vector normed = (load(s + c, lanes) - mean) * rstd;
                store(y + c, normed * load(weight + c, lanes) + load(bias + c, lanes), lanes);
            });
        }
    }
}

template <typename Y, typename X>
void differentiate(const TDLayerNormGrad& p, int64_t image, int64_t first, int64_t last) {
    const int64_t width = p.pieces * p.piece_width, rows = p.chunks.rows;
    const float* weight = p.weight.data + image * p.weight.image_stride;
    const float* bias = p.bias.data + image * p.bias.image_stride;
    float* dweight = p.partial + (image * p.chunks.chunks + first / p.chunks.count) * width;
    float* dbias = dweight + p.chunks.images * p.chunks.chunks * width;
    columns(width, [&](int64_t c, auto lanes) {
        store(dweight + c, Vector{}, lanes);
        store(dbias + c, Vector{}, lanes);
    });
    for (int64_t row = first; row < last; ++row) {
        const float mean = p.mean[image * rows + row], rstd = p.rstd[image * rows + row];
        const Y* dy = row_of<const Y>(p.dy, image, row);
        Vector total[2] = {};
        for (int64_t i = 0; p.dx && i < p.pieces; ++i) {
            const int64_t offset = i * p.piece_width;
            const X* x = row_of<const X>(p.x[i], image, row);
            accumulate(p.piece_width, total, [&](Vector(&sums)[2], int64_t c, auto lanes) {
                const Vector g = load(dy + offset + c, lanes) * load(weight + offset + c, lanes);
                sums[0] += g;
                sums[1] += g * (load(x + c, lanes) - mean);
            });
        }
        const float mean_g = sum(total[0]) / width, dot = sum(total[1]) * rstd / width;
        for (int64_t i = 0; i < p.pieces; ++i) {
            const int64_t offset = i * p.piece_width;
            const X* x = row_of<const X>(p.x[i], image, row);
            const X* dsum = p.dsum.data ? row_of<const X>(p.dsum, image, row) : nullptr;
            X* dx = static_cast<X*>(p.dx);
            if (dx) dx += ((i * p.chunks.images + image) * rows + row) * p.piece_width;
            Y* y = p.y.data ? row_of<Y>(p.y, image, row) + offset : nullptr;
            columns(p.piece_width, [&](int64_t c, auto lanes) {
                const int64_t channel = offset + c;
                const Vector normed = (load(x + c, lanes) - mean) * rstd;
                const Vector grad = load(dy + channel, lanes), w = load(weight + channel, lanes);
                store(dweight + channel, load(dweight + channel, lanes) + grad * normed, lanes);
                store(dbias + channel, load(dbias + channel, lanes) + grad, lanes);
                if (dx) {
                    // `unfused`: g is rounded like its mean, so that they cancel in a row of one.
                    Vector ds = (unfused(grad * w) - mean_g - normed * dot) * rstd;
                    if (dsum) ds += load(dsum + c, lanes);
                    store(dx + c, ds, lanes);
                }
                if (y) store(y + c, normed * w + load(bias + channel, lanes), lanes);
            });
        }
    }
}

}  // namespace

void td_layer_norm(const TDLayerNorm& p, int64_t begin, int64_t end) {
    each_chunk(p.chunks, begin, end, [&](int64_t image, int64_t first, int64_t last) {
        with_input(p.x[0], p.residual,
                   [&]<typename Input>(Input*) { add_and_average<Input>(p, image, first, last); });
        with_type(p.sum[0].dtype, [&]<typename S>(S*) {
            deviate<S>(p, image, first, last);
            with_type(p.y.dtype,
                      [&]<typename Y>(Y*) { scale_and_shift<S, Y>(p, image, first, last); });
        });
    });
}

void td_layer_norm_grad(const TDLayerNormGrad& p, int64_t begin, int64_t end) {
    each_chunk(p.chunks, begin, end, [&](int64_t image, int64_t first, int64_t last) {
        with_type(p.dy.dtype, [&]<typename Y>(Y*) {
            with_type(p.x[0].dtype,
                      [&]<typename X>(X*) { differentiate<Y, X>(p, image, first, last); });
        });
    });
}

}  // namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET
