// Powers of two and functions based on them, for one register at a time. `WIDE` functions are as
// accurate as fp32 needs, the others as bf16 and fp16 need. For kernels/*.cpp only.
#pragma once

#include "../vector.h"

namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET {
namespace {

constexpr float LOG2_E = 1.44269504f;

template <int N>
inline Vector polynomial(Vector x, const float (&coefficients)[N]) {
    Vector sum = broadcast(coefficients[0]);
#pragma GCC unroll 16
    for (int i = 1; i < N; ++i) sum = sum * x + coefficients[i];
    return sum;
}

// 2^x for x <= 127; 0 where the result is smaller than any normal number, NaN for NaN. The
// polynomials approximate 2^f for |f| <= 1/2 with the least relative error, 2e-9 (WIDE) or 7e-5.
template <bool WIDE>
inline Vector exp2(Vector x) {
#if defined(__AVX512F__)
    // If one operand is NaN, the instruction returns the second.
    x = _mm512_max_ps(_mm512_set1_ps(-160.0f), x);
    const Vector whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    x = x < -127.0f ? broadcast(-127.0f) : x;
    // The last bit of the sum has the value one: its low bits are the nearest integer.
    const Vector shifted = x + 0x1.8p23f, whole = shifted - 0x1.8p23f;
#endif
    const Vector part = x - whole;
    Vector power;
    if constexpr (WIDE)
        power = polynomial(part, {1.53458118e-4f, 1.33999312e-3f, 9.61848896e-3f, 5.55032878e-2f,
                                  2.40226469e-1f, 6.93147206e-1f, 1.0f});
    else
        power = polynomial(part, {5.51716672e-2f, 2.42611122e-1f, 6.93260986e-1f, 9.99928074e-1f});
#if defined(__AVX512F__)
    return _mm512_scalef_ps(power, whole);
#else
    return power * bits_as<Vector>((bits_as<Bits>(shifted) + 127u) << 23);
#endif
}

// The normal distribution Φ(a). log₂ Φ(−a) is a polynomial fitted on 0 <= a <= 6 with the weight
// max(√(2Φ), 0.01); beyond 6 it decreases ever faster. The error of Φ is at most 4e-8 if WIDE,
// otherwise 6e-7; where Φ > 1e-9 the relative error is at most 6e-6 and 2e-4.
template <bool WIDE>
inline Vector normal_cdf(Vector a) {
    const Vector size = absolute(a);
    Vector log2_tail;
    if constexpr (WIDE)
        log2_tail =
            polynomial(size, {-2.29395097e-8f, 7.1018471e-7f, -9.39972418e-6f, 6.7480412e-5f,
                              -2.49333663e-4f, -6.15125237e-5f, 7.01985398e-3f, -5.24884234e-2f,
                              -4.59206478e-1f, -1.15110564f, -1.0f});
    else
        log2_tail =
            polynomial(size, {-9.05794577e-7f, 4.5160062e-5f, -8.20323157e-4f, 8.15685124e-3f,
                              -5.34112472e-2f, -4.58855817e-1f, -1.15114944f, -1.0f});
    const Vector tail = exp2<WIDE>(log2_tail);
    return a < 0.0f ? tail : 1.0f - tail;
}

// The normal density φ(a).
template <bool WIDE>
inline Vector normal_density(Vector a) {
    constexpr float LOG2_AT_0 = -1.32574806f;
    return exp2<WIDE>(a * a * (-0.5f * LOG2_E) + LOG2_AT_0);
}

// Zero, and no number that a gradient could multiply, where the gate is closed.
inline Vector sigmoid(Vector x) {
    const Vector power = x * -LOG2_E;
    return power > 127.0f ? Vector{} : 1.0f / (1.0f + exp2<true>(power));
}

}  // namespace
}  // namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET
