// A register of fp32 numbers in the instruction set that this file is compiled for, and how each
// dtype is loaded into and stored from it. For kernels/*.cpp only.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtypes.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * LANES)));

constexpr int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

inline Vector broadcast(float value) { return value - Vector{}; }

template <typename To, typename From>
inline To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &value, sizeof(to));
    return to;
}

template <typename To>
inline To read(const void* from) {
    To to;
    __builtin_memcpy(&to, from, sizeof(to));
    return to;
}

template <typename From>
inline void write(void* to, From from) {
    __builtin_memcpy(to, &from, sizeof(from));
}

inline Vector load(const float* from) { return read<Vector>(from); }

// GCC's own conversion of vectors would split them into halves and join them again.
inline Bits widened(HalfBits from) {
#if defined(__AVX512F__)
    return (Bits)_mm512_cvtepu16_epi32((__m256i)from);
#elif defined(__AVX2__)
    return (Bits)_mm256_cvtepu16_epi32((__m128i)from);
#else
    return __builtin_convertvector(from, Bits);
#endif
}

inline Vector load(const BFloat16* from) {
    return bits_as<Vector>(widened(read<HalfBits>(from)) << 16);
}

inline Vector load(const Half* from) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(read<__m256i>(from));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(read<__m128i>(from));
#else
    const Bits wide = __builtin_convertvector(read<HalfBits>(from), Bits);
    const Bits sign = (wide & 0x8000u) << 16, magnitude = (wide & 0x7fffu) << 13;
    // A product corrects the exponent's bias; it also makes denormal numbers normal.
    const Bits scaled = bits_as<Bits>(bits_as<Vector>(magnitude) * 0x1p112f);
    const Bits infinite = (Bits)(magnitude >= (0x7c00u << 13));
    return bits_as<Vector>(sign | scaled | (infinite & 0x7f800000u));
#endif
}

inline void store(float* to, Vector from) { write(to, from); }

inline void store(BFloat16* to, Vector from) {
#if defined(__AVX512BF16__)
    write(to, (__m256i)_mm512_cvtneps_pbh(from));
#else
    const Bits bits = bits_as<Bits>(from);
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits nan = (Bits)(from != from);
    write(to, __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), HalfBits));
#endif
}

inline void store(Half* to, Vector from) {
#if defined(__AVX512F__)
    write(to, _mm512_cvtps_ph(from, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    write(to, _mm256_cvtps_ph(from, _MM_FROUND_TO_NEAREST_INT));
#else
    const Bits bits = bits_as<Bits>(from);
    const Bits sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    const Bits nan = (Bits)(from != from);
    // Adding a number whose last bit is that of the result rounds it, also for denormal results.
    Bits exponent = magnitude & 0x7f800000u;
    const Bits small = (Bits)(exponent < 0x38800000u);
    exponent = (small & 0x38800000u) | (~small & exponent);
    const Vector scale = bits_as<Vector>(exponent + (13u << 23));
    const Vector rounded = (bits_as<Vector>(magnitude) + scale) - scale;
    const Bits result = bits_as<Bits>(rounded * 0x1p-112f) >> 13;
    const Bits large = (Bits)(bits_as<Bits>(rounded) >= 0x47800000u);
    const Bits finite = (large & 0x7c00u) | (~large & result);
    write(to, __builtin_convertvector(sign | (nan & 0x7e00u) | (~nan & finite), HalfBits));
#endif
}

// Loads or stores the first `count` lanes, `count` <= LANES; other lanes are zero or not written.
template <typename T>
inline Vector load(const T* from, int64_t count) {
    if (count == LANES) return load(from);
    T lanes[LANES] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
    return load(lanes);
}

template <typename T>
inline void store(T* to, Vector from, int64_t count) {
    if (count == LANES) return store(to, from);
    T lanes[LANES];
    store(lanes, from);
    for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

#if defined(__AVX512F__)
inline __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

inline Vector load(const float* from, int64_t count) {
    return _mm512_maskz_loadu_ps(first(count), from);
}

inline void store(float* to, Vector from, int64_t count) {
    _mm512_mask_storeu_ps(to, first(count), from);
}

inline Vector load(const BFloat16* from, int64_t count) {
    const HalfBits lanes = (HalfBits)_mm256_maskz_loadu_epi16(first(count), from);
    return bits_as<Vector>(__builtin_convertvector(lanes, Bits) << 16);
}

inline Vector load(const Half* from, int64_t count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), from));
}

template <typename T>
inline void store_halves(T* to, Vector from, int64_t count) {
    HalfBits lanes;
    store(reinterpret_cast<T*>(&lanes), from);
    if (count == LANES)
        write(to, lanes);
    else
        _mm256_mask_storeu_epi16(to, first(count), (__m256i)lanes);
}

inline void store(BFloat16* to, Vector from, int64_t count) { store_halves(to, from, count); }

inline void store(Half* to, Vector from, int64_t count) { store_halves(to, from, count); }
#endif

// Rounds to T: the value that is read back after it is stored as T.
template <typename T>
inline Vector rounded(Vector from) {
    T lanes[LANES];
    store(lanes, from);
    return load(lanes);
}

inline float sum(Vector v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#else
    float lanes[LANES];
    store(lanes, v);
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
    return lanes[0];
#endif
}

inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

inline float largest(Vector v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(v);
#else
    float most = v[0];
    for (int i = 1; i < LANES; ++i) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

inline Vector absolute(Vector v) { return bits_as<Vector>(bits_as<Bits>(v) & 0x7fffffffu); }

// The lowest byte of each lane.
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
inline Bytes lowest_bytes(Bits from) {
#if defined(__AVX512F__)
    return (Bytes)_mm512_cvtepi32_epi8((__m512i)from);
#else
    return __builtin_convertvector(from, Bytes);
#endif
}

}  // namespace
}  // namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET
