// gelu(a) · b of rows [a, b], where gelu(a) = a · Φ(a), and its gradient
//
//     da = dy · b · (Φ(a) + a · φ(a))        db = dy · a · Φ(a)
//
// An element is read once, and nothing is stored for the gradient, which can also compute the
// result again.

#include "gated_gelu.h"

#include "columns.h"
#include "exponential.h"

namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET {
namespace {

template <typename T>
constexpr bool IS_WIDE = sizeof(T) == sizeof(float);

template <typename T>
void forward(const GatedGELU& p, int64_t image, int64_t row) {
    const T *a_row = row_of<T>(p.x, image, row), *b_row = a_row + p.hidden;
    T* y = row_of<T>(p.y, image, row);
    columns(p.hidden, [&](int64_t c, auto lanes) {
        const Vector a = load(a_row + c, lanes), b = load(b_row + c, lanes);
        store(y + c, a * normal_cdf<IS_WIDE<T>>(a) * b, lanes);
    });
}

template <typename T>
void backward(const GatedGELUGrad& p, int64_t image, int64_t row) {
    const T *a_row = row_of<T>(p.x, image, row), *b_row = a_row + p.hidden;
    const T* dy = row_of<T>(p.dy, image, row);
    T* y = p.y.data ? row_of<T>(p.y, image, row) : nullptr;
    T *da = row_of<T>(p.dx, image, row), *db = da + p.hidden;
    columns(p.hidden, [&](int64_t c, auto lanes) {
        const Vector a = load(a_row + c, lanes), b = load(b_row + c, lanes);
        const Vector g = load(dy + c, lanes), cdf = normal_cdf<IS_WIDE<T>>(a);
        store(da + c, g * b * (cdf + a * normal_density<IS_WIDE<T>>(a)), lanes);
        store(db + c, g * a * cdf, lanes);
        if (y) store(y + c, a * cdf * b, lanes);
    });
}

}  // namespace

void gated_gelu(const GatedGELU& p, int64_t begin, int64_t end) {
    with_type(p.x.dtype, [&]<typename T>(T*) {
        each_chunk(p.chunks, begin, end, [&](int64_t image, int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) forward<T>(p, image, row);
        });
    });
}

void gated_gelu_grad(const GatedGELUGrad& p, int64_t begin, int64_t end) {
    with_type(p.x.dtype, [&]<typename T>(T*) {
        each_chunk(p.chunks, begin, end, [&](int64_t image, int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) backward<T>(p, image, row);
        });
    });
}

}  // namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET
