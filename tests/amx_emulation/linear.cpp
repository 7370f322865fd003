// Compares csrc/cpu/kernels/linear.cpp with emulated AMX instructions with the same file without
// AMX. Prints a line per case: sizes, the largest difference, and the largest number.

#include "amx.h"

#define DIMR_FAST_AMX
#define DIMR_FAST_INSTRUCTION_SET amx
#include "cpu/kernels/linear.cpp"
#undef DIMR_FAST_INSTRUCTION_SET
#undef DIMR_FAST_AMX

#include <cmath>
#include <random>
#include <vector>

using namespace dimr_fast;

namespace {

std::mt19937 generator(0);

// Small integers: bf16 stores them, and their products have the same sum in any order.
std::vector<float> random(int64_t count) {
    std::uniform_int_distribution<int> integers(-8, 8);
    std::vector<float> numbers(count);
    for (float& number : numbers) number = static_cast<float>(integers(generator));
    return numbers;
}

// Memory that starts at a cache line, filled with NaN.
struct Aligned {
    explicit Aligned(int64_t bytes) : data(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {
        std::memset(data, 0xff, (bytes + 63) / 64 * 64);
    }
    ~Aligned() { std::free(data); }
    void* const data;
};

struct Functions {
    decltype(amx::pack_linear)* pack;
    decltype(amx::linear_scratch)* scratch;
    decltype(amx::linear)* run;
};

void compare(Factors factors, int64_t rows, int64_t depth, int64_t columns, bool gated) {
    const auto x = random(rows * depth), weight = random(columns * depth), bias = random(columns);
    const Rows input{const_cast<float*>(x.data()), DType::FLOAT32, rows * depth, depth};
    std::vector<float> found[2];
    const Functions both[] = {{amx::pack_linear, amx::linear_scratch, amx::linear},
                              {portable::pack_linear, portable::linear_scratch, portable::linear}};
    for (int i = 0; i < 2; ++i) {
        Weights weights{factors, gated, depth, columns, nullptr};
        const Aligned packed(weights.bytes());
        weights.data = packed.data;
        both[i].pack(weights, weight.data(), bias.data());
        found[i].resize(rows * weights.outputs());
        Linear p{};
        p.images = 1;
        p.rows = rows;
        p.x = {&input, 1, depth, LinearInput::Norm::NONE, {}, {}};
        p.weights = weights;
        p.y = {found[i].data(), DType::FLOAT32, 0, weights.outputs()};
        const Aligned scratch(both[i].scratch(weights));
        both[i].run(p, 0, rows, scratch.data);
    }
    float most = 0, difference = 0;
    for (size_t i = 0; i < found[0].size(); ++i) {
        most = std::max(most, std::fabs(found[1][i]));
        const float apart = std::fabs(found[0][i] - found[1][i]);
        difference = apart <= difference ? difference : apart;
    }
    std::printf("%d %ld %ld %ld %d %.9g %.9g\n", static_cast<int>(factors), rows, depth, columns,
                gated, difference, most);
}

}  // namespace

int main() {
    for (const Factors factors : {Factors::BFLOAT16, Factors::INT8})
        for (const int64_t rows : {1, 16, 17, 33, 64})
            for (const int64_t depth : {3, 32, 64, 100, 2058, 4200})
                for (const int64_t columns : {8, 34, 64, 150}) {
                    compare(factors, rows, depth, columns, false);
                    compare(factors, rows, depth, columns, true);
                }
}
