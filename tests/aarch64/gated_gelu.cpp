// Runs the gated GELU of csrc/cpu/kernels/ in float32, bfloat16 and float16 on widths with and
// without whole vectors, and compares it with double precision. Prints, and returns 1, if an error
// exceeds twice the rounding error of the dtype.

#include "cpu/kernels/gated_gelu.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

using namespace dimr_fast;

namespace {

float wide(BFloat16 x) {
    const uint32_t bits = uint32_t{x.bits} << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

float wide(Half x) {
    __fp16 y;
    std::memcpy(&y, &x, sizeof y);
    return static_cast<float>(y);
}

float wide(float x) { return x; }

void narrow(float x, BFloat16* y) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    y->bits = static_cast<uint16_t>(bits >> 16);
}

void narrow(float x, Half* y) {
    const __fp16 z = static_cast<__fp16>(x);
    std::memcpy(y, &z, sizeof z);
}

void narrow(float x, float* y) { *y = x; }

// Returns the number of wrong elements; `epsilon` is the dtype's spacing at 1.
template <typename T>
int check(DType dtype, const char* name, double epsilon) {
    int wrong = 0;
    for (const int64_t hidden : {1, 7, 16, 61, 256}) {
        constexpr int64_t ROWS = 3;
        std::vector<T> x(ROWS * 2 * hidden), y(ROWS * hidden);
        for (size_t i = 0; i < x.size(); ++i)
            narrow(-6 + 12 * static_cast<float>((i * 7919) % 1009) / 1009, &x[i]);
        GatedGELU p{};
        p.chunks = {1, ROWS, ROWS, 1};
        p.hidden = hidden;
        p.x = {x.data(), dtype, 0, 2 * hidden};
        p.y = {y.data(), dtype, 0, hidden};
        DIMR_FAST_CHOOSE_FOR(InstructionSet::PORTABLE, gated_gelu)(p, 0, 1);
        for (int64_t row = 0; row < ROWS; ++row)
            for (int64_t c = 0; c < hidden; ++c) {
                const double a = wide(x[row * 2 * hidden + c]);
                const double b = wide(x[row * 2 * hidden + hidden + c]);
                const double expected = a * std::erfc(-a / std::sqrt(2.0)) / 2 * b;
                const double found = wide(y[row * hidden + c]);
                // The second term is for Φ near 0, which is a difference from 1.
                const double allowed = 2 * epsilon * std::fabs(expected) + 4e-6;
                if (!(std::fabs(found - expected) <= allowed)) {
                    std::printf("%s, hidden %d: got %g, expected %g\n", name,
                                static_cast<int>(hidden), found, expected);
                    ++wrong;
                }
            }
    }
    return wrong;
}

}  // namespace

int main() {
    const int wrong = check<float>(DType::FLOAT32, "float32", 0x1p-23) +
                      check<BFloat16>(DType::BFLOAT16, "bfloat16", 0x1p-8) +
                      check<Half>(DType::FLOAT16, "float16", 0x1p-11);
    std::printf("%d wrong\n", wrong);
    return wrong != 0;
}
