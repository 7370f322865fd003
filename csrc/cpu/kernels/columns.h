// Loops over the columns of a row, one vector at a time. For kernels/*.cpp only.
#pragma once

#include "../vector.h"
#include "rows.h"

namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET {
namespace {

// Used in place of a count of lanes to mean all of them.
struct All {};

template <typename T>
inline Vector load(const T* from, All) {
    return load(from);
}

template <typename T>
inline void store(T* to, Vector from, All) {
    store(to, from);
}

// Sets the lanes after the first `count` to zero.
inline Vector keep(Vector from, int64_t count) {
    Bits lane{};
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    const Bits kept = (Bits)(lane < Bits{} + static_cast<uint32_t>(count));
    return bits_as<Vector>(bits_as<Bits>(from) & kept);
}
inline Vector keep(Vector from, All) { return from; }

// Prevents the compiler from fusing a product with a sum, which would skip the product's rounding.
inline Vector unfused(Vector product) {
#if defined(__x86_64__)
    asm("" : "+x"(product));
#else
    asm("" : "+m"(product));
#endif
    return product;
}

template <typename Function>
inline void columns(int64_t width, Function function) {
    int64_t c = 0;
    for (; c + LANES <= width; c += LANES) function(c, All{});
    if (c < width) function(c, width - c);
}

// Sums over a row: calls `add(sums, column, lanes)` for each vector. Several sets of sums
// alternate, because an add must wait for the previous one to the same sum.
template <int SUMS, typename Add>
inline void accumulate(int64_t width, Vector (&total)[SUMS], Add add) {
    constexpr int SETS = 4 / SUMS;
    Vector sums[SETS][SUMS] = {};
    int64_t c = 0;
    for (; c + SETS * LANES <= width; c += SETS * LANES)
#pragma GCC unroll 4
        for (int i = 0; i < SETS; ++i) add(sums[i], c + i * LANES, All{});
    for (; c + LANES <= width; c += LANES) add(sums[0], c, All{});
    if (c < width) add(sums[1], c, width - c);
    for (int i = 0; i < SETS; ++i)
        for (int j = 0; j < SUMS; ++j) total[j] += sums[i][j];
}

template <typename T>
inline T* row_of(const Rows& rows, int64_t image, int64_t row) {
    return static_cast<T*>(rows.data) + image * rows.image_stride + row * rows.row_stride;
}

struct None {};
template <typename A, typename B>
struct Promoted {
    using type = float;
};
template <typename A>
struct Promoted<A, A> {
    using type = A;
};

// A row of x + residual. Each value is stored in `sum` and returned rounded to that dtype.
template <typename X, typename Residual>
struct Input {
    using Sum = typename Promoted<X, Residual>::type;
    const X* x;
    const Residual* residual;
    Sum* sum;

    Input(const Rows& x, const Rows& residual, const Rows& sum, int64_t image, int64_t row)
        : x(row_of<X>(x, image, row)),
          residual(row_of<Residual>(residual, image, row)),
          sum(row_of<Sum>(sum, image, row)) {}

    template <typename Lanes>
    Vector operator()(int64_t c, Lanes lanes) const {
        const Vector value = load(x + c, lanes) + load(residual + c, lanes);
        store(sum + c, value, lanes);
        return rounded<Sum>(value);
    }
};

// A row of x alone.
template <typename X>
struct Input<X, None> {
    using Sum = X;
    const X* x;

    Input(const Rows& x, const Rows&, const Rows&, int64_t image, int64_t row)
        : x(row_of<X>(x, image, row)) {}

    template <typename Lanes>
    Vector operator()(int64_t c, Lanes lanes) const {
        return load(x + c, lanes);
    }
};

// Calls `function` with the type of Input for the dtypes of x and the residual, if there is one.
template <typename Function>
inline void with_input(const Rows& x, const Rows& residual, Function function) {
    with_type(x.dtype, [&]<typename X>(X*) {
        if (!residual.data) return function(static_cast<Input<X, None>*>(nullptr));
        with_type(residual.dtype, [&]<typename Residual>(Residual*) {
            function(static_cast<Input<X, Residual>*>(nullptr));
        });
    });
}

// Calls `function(image, first, last)` with the rows of each task.
template <typename Function>
inline void each_chunk(const Chunks& p, int64_t begin, int64_t end, Function function) {
    for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % p.chunks * p.count, last = first + p.count;
        function(task / p.chunks, first, last < p.rows ? last : p.rows);
    }
}

}  // namespace
}  // namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET
