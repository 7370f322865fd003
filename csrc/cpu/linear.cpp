// Linear layers of kernels/linear.h on all threads. dimr_fast::pack_linear stores weights as one
// tensor in their layout, after a header with their sizes.

#include "linear.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>

namespace dimr_fast {
namespace {

struct Header {
    int64_t factors, gated, depth, columns;
    int64_t unused[4];  // the weights start at a cache line
};

// AMX is used for linear layers only.
#if defined(__x86_64__)
#define CHOOSE(function) \
    (instruction_set() == InstructionSet::AMX ? amx::function : DIMR_FAST_CHOOSE(function))
#else
#define CHOOSE(function) DIMR_FAST_CHOOSE(function)
#endif

// Sizes whose products cannot overflow.
constexpr int64_t MOST = int64_t{1} << 24;

Weights checked(const Header& header) {
    STD_TORCH_CHECK(header.factors >= 0 && header.factors <= static_cast<int64_t>(Factors::INT8),
                    "factors: expected 0 (float32), 1 (bfloat16) or 2 (int8), got ",
                    header.factors);
    STD_TORCH_CHECK(header.depth > 0 && header.depth < MOST && header.columns > 0 &&
                        header.columns < MOST && (!header.gated || header.columns % 2 == 0),
                    "weight: expected [N, K], with even N if gated");
    // Sums of products of integers of at most 127 fit in 32 bits. They are computed with 128 added
    // to the left factor: such a sum may exceed 32 bits, but modulo 2³² nothing is lost.
    STD_TORCH_CHECK(header.factors != static_cast<int64_t>(Factors::INT8) || header.depth < 1 << 17,
                    "weight: expected fewer than 131072 columns for int8");
    return {static_cast<Factors>(header.factors), header.gated != 0, header.depth, header.columns,
            nullptr};
}

Tensor pack(const Tensor& weight, const std::optional<Tensor>& bias, int64_t factors, bool gated) {
    STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.is_cpu() &&
                        weight.scalar_type() == ScalarType::Float,
                    "weight: expected float32 [N, K] on the CPU, contiguous");
    const Header header{factors, gated, weight.size(1), weight.size(0), {}};
    Weights weights = checked(header);
    if (bias)
        STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weights.columns &&
                            bias->is_contiguous() && bias->is_cpu() &&
                            bias->scalar_type() == ScalarType::Float,
                        "bias: expected float32 [", weights.columns, "] on the CPU, contiguous");
    const int64_t bytes = static_cast<int64_t>(sizeof(Header)) + weights.bytes();
    Tensor packed = torch::stable::new_empty(weight, {bytes}, ScalarType::Byte);
    char* const to = static_cast<char*>(packed.mutable_data_ptr());
    std::memcpy(to, &header, sizeof(Header));
    weights.data = to + sizeof(Header);
    CHOOSE(pack_linear)
    (weights, weight.const_data_ptr<float>(), bias ? bias->const_data_ptr<float>() : nullptr);
    return packed;
}

}  // namespace

Weights packed_weights(const Tensor& packed) {
    STD_TORCH_CHECK(packed.dim() == 1 && packed.is_contiguous() && packed.is_cpu() &&
                        packed.scalar_type() == ScalarType::Byte &&
                        packed.numel() >= static_cast<int64_t>(sizeof(Header)),
                    "parameters: expected a result of pack_linear");
    Header header;
    const char* const from = static_cast<const char*>(packed.const_data_ptr());
    std::memcpy(&header, from, sizeof(Header));
    Weights weights = checked(header);
    STD_TORCH_CHECK(packed.numel() == static_cast<int64_t>(sizeof(Header)) + weights.bytes(),
                    "parameters: expected a result of pack_linear");
    weights.data = const_cast<char*>(from) + sizeof(Header);
    return weights;
}

void run_linear(const std::vector<Linear>& layers) {
    const int64_t rows = layers[0].images * layers[0].rows;
    if (rows == 0) return;
    int64_t tile = 1, bytes = 0, cost = 0;
    for (const Linear& layer : layers) {
        tile = std::max(tile, CHOOSE(linear_tile_rows)(layer.weights));
        bytes = std::max(bytes, CHOOSE(linear_scratch)(layer.weights));
        cost += layer.weights.elements() * layer.weights.columns / 16;
    }
    parallel((rows + tile - 1) / tile, tile * cost, [&](int64_t begin, int64_t end) {
        const Scratch scratch({bytes});
        const int64_t first = begin * tile, last = std::min(rows, end * tile);
        // Blocks of about equally many tiles.
        const int64_t most = LINEAR_ROWS / tile, tiles = end - begin;
        const int64_t blocks = (tiles + most - 1) / most;
        const int64_t step = (tiles + blocks - 1) / blocks * tile;
        for (int64_t row = first; row < last; row += step)
            for (const Linear& layer : layers)
                CHOOSE(linear)(layer, row, std::min(last, row + step), scratch.data());
    });
}

STABLE_TORCH_LIBRARY_IMPL(dimr_fast, CPU, m) { m.impl("pack_linear", TORCH_BOX(&pack)); }

}  // namespace dimr_fast
