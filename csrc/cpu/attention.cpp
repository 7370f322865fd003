// dimr_fast::attention_fwd on the CPU. The arithmetic is in kernels/.

#include "kernels/attention.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "operators.h"
#include "rows.h"

namespace dimr_fast {

void run_attention(const Attention& given) {
    Attention p = given;
    // Tasks keep a handful of threads busy. Every split copies the keys and values of its head
    // again, so a split has at least 32 queries.
    constexpr int64_t ENOUGH_TASKS = 32, LEAST_QUERIES = 32;
    const int64_t heads = p.images * p.heads;
    const int64_t most = std::max<int64_t>(1, p.tokens / LEAST_QUERIES);
    p.splits = std::clamp<int64_t>(ENOUGH_TASKS / std::max<int64_t>(1, heads), 1, most);
    const int64_t bytes = DIMR_FAST_CHOOSE(attention_scratch)(p);
    const int64_t cost = p.tokens * p.tokens / p.splits * p.head_dim / 4;
    parallel(heads * p.splits, cost, [&](int64_t begin, int64_t end) {
        const Scratch scratch({bytes});
        DIMR_FAST_CHOOSE(attention)(p, begin, end, scratch.data());
    });
}

namespace {

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& qkv, int64_t heads) {
    // Not `% (3 * heads)`, which overflows for absurd numbers of heads.
    STD_TORCH_CHECK(
        qkv.dim() == 3 && heads > 0 && qkv.size(2) % 3 == 0 && qkv.size(2) / 3 % heads == 0,
        "qkv: expected [B, N, 3 * ", heads, " * head_dim]");
    const Features rows(qkv, "qkv");
    const int64_t width = rows.width / 3;
    Tensor y = torch::stable::new_empty(qkv, {rows.images, rows.rows, width});
    Tensor statistics =
        torch::stable::new_empty(qkv, {rows.images, heads, 2, rows.rows}, ScalarType::Float);
    if (rows.empty()) return {y, statistics};
    Attention p{};
    p.images = rows.images;
    p.tokens = rows.rows;
    p.heads = heads;
    p.head_dim = width / heads;
    p.qkv = rows.view;
    p.y = rows_in(y, rows, width);
    p.statistics = statistics.mutable_data_ptr<float>();
    run_attention(p);
    return {y, statistics};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dimr_fast, CPU, m) { m.impl("attention_fwd", TORCH_BOX(&attention_fwd)); }

}  // namespace dimr_fast
