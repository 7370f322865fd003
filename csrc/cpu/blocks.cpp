// dimr_fast::branch_blocks: all blocks of a branch in one call, without gradients.
//
// A small model spends more time between operators than in them: in Python, in the dispatcher and
// in the bookkeeping of gradients. Here only matrix products go through PyTorch's dispatcher.

#include <torch/csrc/stable/library.h>

#include "linear.h"
#include "operators.h"
#include "rows.h"

namespace dimr_fast {
namespace {

// The parameters of the blocks, in the order in which they are used.
class Parameters {
  public:
    explicit Parameters(const std::vector<Tensor>& tensors) : tensors_(tensors) {}

    const Tensor& next() {
        STD_TORCH_CHECK(used_ < tensors_.size(), "parameters: expected more than ",
                        tensors_.size());
        return tensors_[used_++];
    }

    void check_all_used() const {
        STD_TORCH_CHECK(used_ == tensors_.size(), "parameters: got ", tensors_.size(),
                        ", expected ", used_);
    }

  private:
    const std::vector<Tensor>& tensors_;
    size_t used_ = 0;
};

struct Normed {
    Tensor sum, normed;
};

class Blocks {
  public:
    Blocks(const std::vector<Tensor>& parameters, const std::vector<Tensor>& values, int64_t heads,
           int64_t height, bool layer_norm, bool packed)
        : parameters_(parameters),
          values_(values),
          heads_(heads),
          height_(height),
          layer_norm_(layer_norm),
          packed_(packed) {}

    Tensor run(const Tensor& input, const Tensor& pairs) {
        const int64_t depth = pairs.size(0);
        Tensor x = input;
        for (int64_t j = 0; j <= 2 * depth; ++j) {
            if (j > depth) {
                // The input of an out-block and its skip are the halves of one tensor.
                const Tensor pair = torch::stable::select(pairs, 0, j - depth - 1);
                x = linear_layer(torch::stable::flatten(pair, 2, 3), true);
            }
            x = block(x, slot(pairs, j));
        }
        parameters_.check_all_used();
        values_.check_all_used();
        return x;
    }

  private:
    // Where block j writes its output; nowhere for the last one.
    static std::optional<Tensor> slot(const Tensor& pairs, int64_t j) {
        const int64_t depth = pairs.size(0);
        if (j == 2 * depth) return std::nullopt;
        const int64_t pair = j < depth ? depth - 1 - j : j - depth, half = j < depth ? 1 : 0;
        return torch::stable::select(torch::stable::select(pairs, 0, pair), 2, half);
    }

    Tensor block(const Tensor& x, const std::optional<Tensor>& out) {
        Tensor sum, normed;
        if (heads_ > 0) {
            const Tensor qkv = linear_layer(norm(x, std::nullopt).normed, false);
            const Tensor mixed = linear_layer(std::get<0>(attention_fwd(qkv, heads_)), true);
            std::tie(sum, normed) = both(norm(mixed, x));
        } else {
            const Tensor& weight = parameters_.next();
            const Tensor& bias = parameters_.next();
            const int64_t b = x.size(0), n = x.size(1), d = x.size(2);
            Tensor image = torch::stable::view(x, {b, height_, n / height_, d});
            sum = torch::stable::view(depthwise_conv2d_fwd(image, weight, bias, true), {b, n, d});
            normed = norm(sum, std::nullopt).normed;
        }
        const Tensor hidden = gated_gelu_fwd(linear_layer(normed, true));
        return add(sum, linear_layer(hidden, true), out);
    }

    static std::tuple<Tensor, Tensor> both(const Normed& found) {
        return {found.sum, found.normed};
    }

    Normed norm(const Tensor& x, const std::optional<Tensor>& residual) {
        if (layer_norm_) {
            const Tensor& weight = values_.next();
            const Tensor& bias = values_.next();
            auto found = td_layer_norm_fwd(weight, bias, {x}, residual, x.scalar_type());
            return {std::get<0>(found), std::get<1>(found)};
        }
        auto found = td_rms_norm_fwd(x, residual, values_.next(), x.scalar_type());
        return {std::get<0>(found), std::get<1>(found)};
    }

    Tensor linear_layer(const Tensor& x, bool has_bias) {
        const Tensor& weight = parameters_.next();
        std::optional<Tensor> bias;
        if (has_bias) bias = parameters_.next();
        return linear(x, weight, bias, packed_);
    }

    static Tensor add(const Tensor& a, const Tensor& b, const std::optional<Tensor>& out) {
        const Features left(a, "a"), right(b, "b");
        right.check_like(left, "b");
        STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "parameters: expected the dtype of x");
        const Tensor to = out ? *out : torch::stable::new_empty(a, a.sizes());
        const Features result(to, "out");
        result.check_like(left, "out");
        STD_TORCH_CHECK(to.stride(-1) == 1, "out: expected adjacent channels");
        if (left.empty()) return to;
        const Chunks chunks = chunks_in_cache(left, left.width);
        each_chunk(chunks, left.width, [&](int64_t begin, int64_t end) {
            DIMR_FAST_CHOOSE(add)(left.view, right.view, result.view, chunks, left.width, begin,
                                  end);
        });
        return to;
    }

    Parameters parameters_, values_;
    const int64_t heads_, height_;
    const bool layer_norm_, packed_;
};

Tensor branch_blocks(const Tensor& x, const Tensor& pairs, const std::vector<Tensor>& values,
                     const std::vector<Tensor>& parameters, int64_t heads, int64_t height,
                     bool layer_norm, bool packed) {
    STD_TORCH_CHECK(x.dim() == 3 && pairs.dim() == 5 && pairs.size(1) == x.size(0) &&
                        pairs.size(2) == x.size(1) && pairs.size(3) == 2 &&
                        pairs.size(4) == x.size(2) && pairs.stride(-1) == 1,
                    "pairs: expected [depth, B, N, 2, D] of x [B, N, D]");
    STD_TORCH_CHECK(x.scalar_type() == pairs.scalar_type(), "pairs: expected the dtype of x");
    STD_TORCH_CHECK(heads > 0 || (height > 0 && x.size(1) % height == 0),
                    "height: expected a divisor of ", x.size(1), ", got ", height);
    return Blocks(parameters, values, heads, height, layer_norm, packed).run(x, pairs);
}

}  // namespace

// Weights in oneDNN's layout have a dispatch key of their own.
STABLE_TORCH_LIBRARY_IMPL(dimr_fast, CompositeExplicitAutograd, m) {
    m.impl("branch_blocks", TORCH_BOX(&branch_blocks));
}

}  // namespace dimr_fast
