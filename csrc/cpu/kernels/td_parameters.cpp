// The values of all time-dependent parameters of a model, and the gradients of their vectors, where
// g is the gradient of the value:
//
//     e = (w + 1)·τ + b        s = 1 / (1 + exp(−e))        value = p1 + s · (p0 − p1)
//
//     dp0 = Σ g·s        dp1 = Σ g·(1 − s)
//     db = (p0 − p1) · Σ g·s·(1 − s)        dw = (p0 − p1) · Σ g·s·(1 − s)·τ
//
// with sums over the times, in order.

#include "td_parameters.h"

#include "exponential.h"

namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET {
namespace {

// One register of columns, in fp32.
struct Columns {
    Vector slope, offset, low, range;

    template <typename T>
    Columns(const TDColumns& block, int64_t c, int64_t count, T*) {
        const auto wide = [&](const void* vector) {
            return load(static_cast<const T*>(vector) + c, count);
        };
        slope = wide(block.weight) + 1.0f;
        offset = wide(block.bias);
        low = wide(block.param1);
        range = wide(block.param0) - low;
    }

    Vector gate(float tau) const { return sigmoid(slope * tau + offset); }
};

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Registers per step: two, because the gradients of one time may be far in memory from those of the
// next, and more of them are read together.
constexpr int SIZE = 2;

template <typename T, typename V>
void gradients(const TDParameters& p, const TDColumns& block, int64_t c) {
    int64_t count[SIZE];
    for (int i = 0; i < SIZE; ++i)
        count[i] = min(LANES, block.count - c - i * LANES) > 0
                       ? min(LANES, block.count - c - i * LANES)
                       : 0;
    const Columns columns[SIZE] = {
        {block, c, count[0], static_cast<T*>(nullptr)},
        {block, count[1] ? c + LANES : c, count[1], static_cast<T*>(nullptr)}};
    Vector dp0[SIZE] = {}, dp1[SIZE] = {}, dweight[SIZE] = {}, dbias[SIZE] = {};
    const V* values = static_cast<const V*>(p.values) + block.place + c;
    for (int64_t time = 0; time < p.times; ++time, values += p.values_stride)
#pragma GCC unroll 2
        for (int i = 0; i < SIZE; ++i) {
            const Vector g = load(values + i * LANES, count[i]);
            const Vector s = columns[i].gate(p.tau[time]), down = g * s, rest = 1.0f - s;
            dp0[i] += down;
            dp1[i] += g * rest;
            dbias[i] += down * rest;
            dweight[i] += down * rest * p.tau[time];
        }
    T* grads = static_cast<T*>(p.grads) + block.place + c;
    for (int i = 0; i < SIZE; ++i, grads += LANES) {
        if (count[i] == 0) break;
        store(grads, dp0[i], count[i]);
        store(grads + p.columns, dp1[i], count[i]);
        store(grads + 2 * p.columns, columns[i].range * dweight[i], count[i]);
        store(grads + 3 * p.columns, columns[i].range * dbias[i], count[i]);
    }
}

}  // namespace

void td_parameters(const TDParameters& p, int64_t begin, int64_t end) {
    with_type(p.dtype, [&]<typename T>(T* type) {
        with_type(p.values_dtype, [&]<typename V>(V*) {
            for (int64_t number = begin; number < end; ++number) {
                const TDColumns& block = p.blocks[number];
                for (int64_t c = 0; c < block.count; c += LANES) {
                    const int64_t count = min(LANES, block.count - c);
                    const Columns columns(block, c, count, type);
                    V* values = static_cast<V*>(p.values) + block.place + c;
                    for (int64_t time = 0; time < p.times; ++time, values += p.values_stride)
                        store(values, columns.low + columns.gate(p.tau[time]) * columns.range,
                              count);
                }
            }
        });
    });
}

void td_parameters_grad(const TDParameters& p, int64_t begin, int64_t end) {
    with_type(p.dtype, [&]<typename T>(T*) {
        with_type(p.values_dtype, [&]<typename V>(V*) {
            for (int64_t number = begin; number < end; ++number)
                for (int64_t c = 0; c < p.blocks[number].count; c += SIZE * LANES)
                    gradients<T, V>(p, p.blocks[number], c);
        });
    });
}

}  // namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET
