// The cascade after its projection: pixel shuffle, layer norm and the add to x.
//
//     y = shuffle(projected)    n = (y − mean(y)) · rstd    out = x + n · weight + bias
//
// and backward, with g = dout · weight, at the shuffled positions:
//
//     dprojected = rstd · (g − mean(g) − n · mean(g·n))    dweight = Σ dout · n    dbias = Σ dout
//
// A box of q × q rows of x is one row of `projected`. Each row is read from memory once and then
// again from the L1 cache: for its mean, its variance about that mean, and the result.

#include "upsample_add.h"

#include "columns.h"

namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET {
namespace {

// Calls `function(row, segment)` for each row of a box; `segment` is its place in the box.
template <typename Function>
inline void each_row(int64_t box, int64_t q, int64_t boxes_in_width, Function function) {
    const int64_t top = box / boxes_in_width * q, left = box % boxes_in_width * q;
    for (int64_t i = 0; i < q; ++i)
        for (int64_t j = 0; j < q; ++j)
            function((top + i) * boxes_in_width * q + left + j, i * q + j);
}

template <typename X, typename P>
void forward(const UpsampleAdd& p, int64_t image, int64_t box) {
    using Out = typename Promoted<X, P>::type;
    const P* projected = row_of<const P>(p.projected, image, box);
    const float *weight = p.weight.data + image * p.weight.image_stride,
                *bias = p.bias.data + image * p.bias.image_stride;
    each_row(box, p.q, p.boxes_in_width, [&](int64_t row, int64_t segment) {
        const P* y = projected + segment * p.width;
        Vector total[1] = {}, squares[1] = {};
        accumulate(p.width, total,
                   [&](Vector(&sums)[1], int64_t c, auto lanes) { sums[0] += load(y + c, lanes); });
        const float mean = sum(total[0]) / p.width;
        accumulate(p.width, squares, [&](Vector(&sums)[1], int64_t c, auto lanes) {
            const Vector centred = keep(load(y + c, lanes) - mean, lanes);
            sums[0] += centred * centred;
        });
        const float rstd = 1.0f / __builtin_sqrtf(sum(squares[0]) / p.width + 1e-5f);
        p.mean[image * p.rows() + row] = mean;
        p.rstd[image * p.rows() + row] = rstd;
        const X* x = row_of<const X>(p.x, image, row);
        Out* out = row_of<Out>(p.out, image, row);
        columns(p.width, [&](int64_t c, auto lanes) {
            const Vector normed = (load(y + c, lanes) - mean) * rstd;
            const Vector added = normed * load(weight + c, lanes) + load(bias + c, lanes);
            store(out + c, load(x + c, lanes) + added, lanes);
        });
    });
}

inline void clear(float* values, int64_t width) {
    columns(width, [&](int64_t c, auto lanes) { store(values + c, Vector{}, lanes); });
}

template <typename G, typename P>
void backward(const UpsampleAddGrad& p, int64_t image, int64_t first, int64_t last) {
    const int64_t segments = p.q * p.q * p.width;
    const int64_t chunk = image * p.chunks.chunks + first / p.chunks.count;
    const float* weight = p.weight.data + image * p.weight.image_stride;
    float* dweight = p.partial + chunk * p.width;
    float* dbias = dweight + p.chunks.images * p.chunks.chunks * p.width;
    float* dsum = p.partial_sum + chunk * segments;
    clear(dweight, p.width);
    clear(dbias, p.width);
    clear(dsum, segments);
    for (int64_t box = first; box < last; ++box)
        each_row(box, p.q, p.boxes_in_width, [&](int64_t row, int64_t segment) {
            const int64_t start = segment * p.width;
            const P* y = row_of<const P>(p.projected, image, box) + start;
            P* dy = row_of<P>(p.dprojected, image, box) + start;
            const G* dout = row_of<const G>(p.dout, image, row);
            const float mean = p.mean[image * p.rows() + row],
                        rstd = p.rstd[image * p.rows() + row];
            Vector sums[2] = {};
            accumulate(p.width, sums, [&](Vector(&s)[2], int64_t c, auto lanes) {
                const Vector g = load(dout + c, lanes) * load(weight + c, lanes);
                s[0] += g;
                s[1] += g * ((load(y + c, lanes) - mean) * rstd);
            });
            const float mean_g = sum(sums[0]) / p.width, dot = sum(sums[1]) / p.width;
            columns(p.width, [&](int64_t c, auto lanes) {
                const Vector grad = load(dout + c, lanes);
                const Vector normed = (load(y + c, lanes) - mean) * rstd;
                const Vector result =
                    (grad * load(weight + c, lanes) - mean_g - normed * dot) * rstd;
                store(dy + c, result, lanes);
                store(dweight + c, load(dweight + c, lanes) + grad * normed, lanes);
                store(dbias + c, load(dbias + c, lanes) + grad, lanes);
                store(dsum + start + c, load(dsum + start + c, lanes) + result, lanes);
            });
        });
}

}  // namespace

void upsample_add(const UpsampleAdd& p, int64_t begin, int64_t end) {
    with_type(p.x.dtype, [&]<typename X>(X*) {
        with_type(p.projected.dtype, [&]<typename P>(P*) {
            each_chunk(p.chunks, begin, end, [&](int64_t image, int64_t first, int64_t last) {
                for (int64_t box = first; box < last; ++box) forward<X, P>(p, image, box);
            });
        });
    });
}

void upsample_add_grad(const UpsampleAddGrad& p, int64_t begin, int64_t end) {
    with_type(p.dout.dtype, [&]<typename G>(G*) {
        with_type(p.projected.dtype, [&]<typename P>(P*) {
            each_chunk(p.chunks, begin, end, [&](int64_t image, int64_t first, int64_t last) {
                backward<G, P>(p, image, first, last);
            });
        });
    });
}

}  // namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET
