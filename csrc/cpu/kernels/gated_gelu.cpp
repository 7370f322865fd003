// gelu(a) · b of a ‖ b in the halves of a row, with gelu(a) = a · Φ(a), and its gradient
//
//     da = dy · b · (Φ(a) + a · φ(a))        db = dy · a · Φ(a)

#include "gated_gelu.h"

#include "exponential.h"

namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET {
namespace {

// Calls `function` with the place and the count of each vector of a row.
template <typename Function>
inline void for_columns(int64_t width, Function function) {
    int64_t column = 0;
    for (; column + LANES <= width; column += LANES) function(column, LANES);
    if (column < width) function(column, width - column);
}

}  // namespace

void gated_gelu(const Rows& x, const Rows& y, int64_t begin, int64_t end) {
    with_type(x.dtype, [&]<typename T>(T*) {
        for (int64_t row = begin; row < end; ++row) {
            const T *a_row = x.at<T>(row), *b_row = a_row + y.width;
            T* y_row = y.at<T>(row);
            for_columns(y.width, [&](int64_t c, int64_t count) {
                const Vector a = load(a_row + c, count), b = load(b_row + c, count);
                store(y_row + c, a * normal_cdf<sizeof(T) == 4>(a) * b, count);
            });
        }
    });
}

void gated_gelu_grad(const Rows& dy, const Rows& x, const Rows& dx, int64_t begin, int64_t end) {
    with_type(x.dtype, [&]<typename T>(T*) {
        constexpr bool WIDE = sizeof(T) == 4;
        for (int64_t row = begin; row < end; ++row) {
            const T *dy_row = dy.at<T>(row), *a_row = x.at<T>(row), *b_row = a_row + dy.width;
            T *da_row = dx.at<T>(row), *db_row = da_row + dy.width;
            for_columns(dy.width, [&](int64_t c, int64_t count) {
                const Vector g = load(dy_row + c, count);
                const Vector a = load(a_row + c, count), b = load(b_row + c, count);
                const Vector cdf = normal_cdf<WIDE>(a);
                store(da_row + c, g * b * (cdf + a * normal_density<WIDE>(a)), count);
                store(db_row + c, g * a * cdf, count);
            });
        }
    });
}

}  // namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET
