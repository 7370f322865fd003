// float16 as CUDA spells it, for tests.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

struct __half {
    uint16_t bits;
};

inline float __half2float(__half value) {
    const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
    const float sign = value.bits >> 15 ? -1.f : 1.f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
    return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}

inline __half __float2half_rn(float value) {
    if (value != value) return {0x7fff};
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float magnitude = std::fabs(value);
    if (magnitude >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};
    // Below 2^-14 the step is 2^-24; above, 2^-10 of the power of two.
    int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
    const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    // A carry of the fraction goes into the exponent, as it should.
    return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + steps))};
}
