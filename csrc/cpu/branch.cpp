// dimr_fast::branch: a branch of the model in one call, without gradients.
//
// Between two operators that mix positions (attention or a convolution), all operators work on rows
// alone: output projection, MLP, skip connection, the next norm and its projection. A task runs all
// of them on its rows, so that features stay in the cache of one core, and threads meet only twice
// per block.

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <list>

#include "kernels/upsample_add.h"
#include "linear.h"
#include "operators.h"
#include "rows.h"

namespace dimr_fast {
namespace {

using Norm = LinearInput::Norm;

// Tensors in the order in which they are used.
class Queue {
  public:
    Queue(const std::vector<Tensor>& tensors, const char* name) : tensors_(tensors), name_(name) {}

    const Tensor& next() {
        STD_TORCH_CHECK(used_ < tensors_.size(), name_, ": expected more than ", tensors_.size());
        return tensors_[used_++];
    }

    void check_all_used() const {
        STD_TORCH_CHECK(used_ == tensors_.size(), name_, ": got ", tensors_.size(), ", expected ",
                        used_);
    }

  private:
    const std::vector<Tensor>& tensors_;
    const char* const name_;
    size_t used_ = 0;
};

// The features of a branch: `first` [B, N, D], the input of its first block; `pairs` [depth, B, N,
// 2, D], the outputs of its blocks but the last, arranged so that those that a skip connection
// joins are adjacent; `last` [B, N, D].
class Stored {
  public:
    Stored(const Tensor& first, const Tensor& pairs, const Tensor& last)
        : images(first.size(0)),
          tokens(first.dim() == 3 ? first.size(1) : 0),
          width(first.size(-1)),
          depth(pairs.dim() == 5 ? pairs.size(0) : 0),
          dtype(first.scalar_type()),
          first_(first),
          pairs_(pairs),
          last_(last) {
        STD_TORCH_CHECK(
            first.dim() == 3 && last.dim() == 3 && pairs.dim() == 5 && pairs.size(1) == images &&
                pairs.size(2) == tokens && pairs.size(3) == 2 && pairs.size(4) == width &&
                last.size(0) == images && last.size(1) == tokens && last.size(2) == width,
            "pairs: expected [depth, B, N, 2, D] of first and last [B, N, D]");
        for (const Tensor& tensor : {first, pairs, last})
            STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == dtype &&
                                (tensor.stride(-1) == 1 || tensor.numel() == 0),
                            "first, pairs, last: expected one dtype, adjacent channels, the CPU");
        STD_TORCH_CHECK(depth == 0 || pairs.numel() == 0 ||
                            (pairs.stride(3) == width && pairs.stride(2) == 2 * width),
                        "pairs: expected adjacent pairs");
    }

    Rows first(int64_t skipped = 0) const { return rows(first_, skipped); }

    Rows output(int64_t block, int64_t skipped = 0) const {
        if (block == 2 * depth) return rows(last_, skipped);
        const int64_t half = block < depth ? 1 : 0;
        Rows found = pair(block < depth ? depth - 1 - block : block - depth);
        found.data = at(found.data, half * width + skipped * found.row_stride);
        return found;
    }

    // The two tensors that a skip connection joins, as rows of 2·D.
    Rows pair(int64_t index) const {
        return {at(pairs_.mutable_data_ptr(), index * pairs_.stride(0)), dtype_of(pairs_, "pairs"),
                pairs_.stride(1), 2 * width};
    }

    const int64_t images, tokens, width, depth;
    const ScalarType dtype;

  private:
    Rows rows(const Tensor& tensor, int64_t skipped) const {
        return {at(tensor.mutable_data_ptr(), skipped * tensor.stride(1)),
                dtype_of(tensor, "first"), tensor.stride(0), tensor.stride(1)};
    }

    void* at(void* data, int64_t offset) const {
        return static_cast<char*>(data) + offset * static_cast<int64_t>(first_.element_size());
    }

    const Tensor first_, pairs_, last_;
};

class Branch {
  public:
    Branch(const Tensor& image, const Stored& stored, const std::vector<Tensor>& values,
           const std::vector<Tensor>& parameters, int64_t heads, bool layer_norm)
        : image_(image),
          stored_(stored),
          values_(values, "values"),
          parameters_(parameters, "parameters"),
          heads_(heads),
          norm_(layer_norm ? Norm::LAYER : Norm::RMS),
          tokens_(stored.tokens),
          width_(stored.width) {}

    Tensor run(const std::optional<Stored>& lower, const std::optional<Tensor>& token,
               bool predicts) {
        embed(token);
        if (lower) add_upsampled(*lower);
        blocks();
        Tensor prediction = predict(predicts);
        values_.check_all_used();
        parameters_.check_all_used();
        return prediction;
    }

  private:
    // The image's patches to `first`, after the class token if there is one.
    void embed(const std::optional<Tensor>& token) {
        const Weights weights = next_weights();
        const int64_t channels = image_.size(1), height = image_.size(2), width = image_.size(3);
        int64_t side = 1;
        while (channels * side * side < weights.depth) ++side;
        STD_TORCH_CHECK(
            channels * side * side == weights.depth && height % side == 0 && width % side == 0,
            "image: its size does not fit the patches");
        height_ = height / side;
        width_in_patches_ = width / side;
        const int64_t positions = height_ * width_in_patches_;
        skipped_ = token ? 1 : 0;
        STD_TORCH_CHECK(stored_.images == image_.size(0) && tokens_ == positions + skipped_,
                        "first: expected a row for each of ", positions + skipped_, " tokens");
        const Tensor& embedding = parameters_.next();
        STD_TORCH_CHECK(embedding.dim() == 2 && embedding.size(0) == positions &&
                            embedding.size(1) == width_ && embedding.is_contiguous() &&
                            embedding.scalar_type() == stored_.dtype,
                        "parameters: expected position embeddings [", positions, ", ", width_, "]");
        Linear layer = linear(weights, positions, stored_.first(skipped_), width_, false);
        layer.patches = {image_.const_data_ptr(), dtype_of(image_, "image"), side,
                         width_in_patches_,       image_.stride(0),          image_.stride(1),
                         image_.stride(2),        image_.stride(3)};
        layer.residual = {embedding.mutable_data_ptr(), dtype_of(embedding, "positions"), 0,
                          width_};
        run_linear({layer});
        if (token) copy_token(*token);
    }

    void copy_token(const Tensor& token) {
        STD_TORCH_CHECK(token.dim() == 2 && token.size(0) == stored_.images &&
                            token.size(1) == width_ && token.is_contiguous() &&
                            token.scalar_type() == stored_.dtype,
                        "token: expected [", stored_.images, ", ", width_, "]");
        const Rows first = stored_.first();
        const int64_t size = static_cast<int64_t>(token.element_size());
        const char* const from = static_cast<const char*>(token.const_data_ptr());
        char* const to = static_cast<char*>(first.data);
        for (int64_t i = 0; i < stored_.images; ++i)
            std::memcpy(to + i * first.image_stride * size, from + i * width_ * size,
                        width_ * size);
    }

    // The cascade: the features of the lower branch, normed, projected, spread over boxes of q × q
    // positions, normed again and added to `first`.
    void add_upsampled(const Stored& lower) {
        const Weights weights = next_weights();
        int64_t q = 1;
        while (q * q * width_ < weights.outputs()) ++q;
        const int64_t boxes_in_width = width_in_patches_ / q, boxes = height_ / q * boxes_in_width;
        const int64_t skipped = lower.tokens - boxes;
        STD_TORCH_CHECK(lower.images == stored_.images && lower.dtype == stored_.dtype &&
                            height_ % q == 0 && width_in_patches_ % q == 0 &&
                            (skipped == 0 || skipped == 1),
                        "lower: its features do not fit this branch");
        std::vector<Rows> pieces{lower.first(skipped)};
        for (int64_t j = 0; j <= 2 * lower.depth; ++j) pieces.push_back(lower.output(j, skipped));
        const int64_t count = static_cast<int64_t>(pieces.size());
        Tensor projected = memory(boxes, q * q * width_);
        const Rows to = rows_of(projected);
        Linear layer = linear(weights, boxes, to, q * q * width_, false);
        set_input(layer, std::move(pieces), lower.width, Norm::LAYER);
        STD_TORCH_CHECK(weights.depth == count * lower.width,
                        "lower: its features do not fit this branch");
        run_linear({layer});

        UpsampleAdd p{};
        const Features shape(projected, "projected");
        p.chunks = chunks_in_cache(shape, shape.width);
        p.q = q;
        p.width = width_;
        p.boxes_in_width = boxes_in_width;
        p.x = p.out = stored_.first(skipped_);
        p.projected = to;
        p.weight = next_values(width_);
        p.bias = next_values(width_);
        const Scratch statistics({2, stored_.images, tokens_, sizeof(float)});
        p.mean = static_cast<float*>(statistics.data());
        p.rstd = p.mean + stored_.images * tokens_;
        each_chunk(p.chunks, shape.width, [&](int64_t begin, int64_t end) {
            DIMR_FAST_CHOOSE(upsample_add)(p, begin, end);
        });
    }

    void blocks() {
        const int64_t depth = stored_.depth;
        const Tensor sum = memory(tokens_, width_), joined = memory(tokens_, width_);
        Tensor qkv, mixed, statistics, hidden;
        Rows x = stored_.first();
        std::vector<Linear> steps;
        if (heads_ > 0) {
            STD_TORCH_CHECK(width_ % heads_ == 0, "heads: expected a divisor of ", width_);
            qkv = memory(tokens_, 3 * width_);
            mixed = memory(tokens_, width_);
            statistics = torch::stable::new_empty(image_, {stored_.images, heads_, 2, tokens_},
                                                  ScalarType::Float);
            steps.push_back(normed(x, rows_of(qkv), 3 * width_, false));
            run_linear(steps);
        }
        for (int64_t j = 0; j <= 2 * depth; ++j) {
            steps.clear();
            if (heads_ > 0) {
                attend(qkv, mixed, statistics);
                steps.push_back(layer(rows_of(mixed), width_, rows_of(sum), x));
            } else {
                convolve(x, rows_of(sum));
            }
            const Weights weights = next_weights();
            if (!hidden.defined() || hidden.size(2) != weights.outputs())
                hidden = memory(tokens_, weights.outputs());
            steps.push_back(
                normed_by(weights, rows_of(sum), rows_of(hidden), weights.outputs(), true));
            x = stored_.output(j);
            steps.push_back(layer(rows_of(hidden), hidden.size(2), x, rows_of(sum)));
            if (j < 2 * depth) {
                if (j >= depth) {
                    steps.push_back(
                        layer(stored_.pair(j - depth), 2 * width_, rows_of(joined), {}));
                    x = rows_of(joined);
                }
                if (heads_ > 0) steps.push_back(normed(x, rows_of(qkv), 3 * width_, false));
            }
            run_linear(steps);
        }
    }

    void attend(const Tensor& qkv, const Tensor& mixed, const Tensor& statistics) {
        Attention p{};
        p.images = stored_.images;
        p.tokens = tokens_;
        p.heads = heads_;
        p.head_dim = width_ / heads_;
        p.qkv = rows_of(qkv);
        p.y = rows_of(mixed);
        p.statistics = statistics.mutable_data_ptr<float>();
        if (stored_.images * tokens_ > 0) run_attention(p);
    }

    void convolve(const Rows& x, const Rows& y) {
        const Tensor& weight = parameters_.next();
        const Tensor& bias = parameters_.next();
        const int64_t kernel = weight.dim() == 4 ? weight.size(3) : 0;
        STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == width_ && weight.size(1) == 1 &&
                            weight.size(2) == kernel && kernel % 2 == 1 && bias.dim() == 1 &&
                            bias.size(0) == width_ && weight.is_contiguous() &&
                            bias.is_contiguous() && weight.scalar_type() == stored_.dtype &&
                            bias.scalar_type() == stored_.dtype,
                        "parameters: expected filters [", width_, ", 1, k, k] and a bias");
        DepthwiseConv2d p{};
        p.batch = stored_.images;
        p.height = height_;
        p.width = width_in_patches_;
        p.channels = width_;
        p.kernel = kernel;
        p.x = picture(x);
        p.y = picture(y);
        p.weight = weight.const_data_ptr();
        p.bias = bias.const_data_ptr();
        p.weight_dtype = x.dtype;
        p.residual = true;
        if (stored_.images > 0) run_depthwise_conv2d(p);
    }

    Image picture(const Rows& x) const {
        return {x.data, x.dtype, x.image_stride, width_in_patches_ * x.row_stride, x.row_stride};
    }

    // The head: norm, convolution, channels first. The products of all taps of the filters are a
    // linear layer; then each output sums those of its neighbours.
    Tensor predict(bool predicts) {
        const Weights weights = next_weights();
        const Tensor& bias = parameters_.next();
        const int64_t channels = image_.size(1), positions = height_ * width_in_patches_;
        int64_t kernel = 1;
        while (channels * kernel * kernel < weights.outputs()) kernel += 2;
        STD_TORCH_CHECK(channels * kernel * kernel == weights.outputs() && bias.dim() == 1 &&
                            bias.size(0) == channels && bias.is_contiguous() &&
                            bias.scalar_type() == ScalarType::Float,
                        "parameters: expected a head for ", channels, " channels");
        Tensor taps = torch::stable::new_empty(
            image_, {stored_.images, positions, weights.outputs()}, ScalarType::Float);
        Linear layer = linear(weights, positions, rows_of(taps), weights.outputs(), false);
        set_input(layer, {stored_.output(2 * stored_.depth, skipped_)}, width_, Norm::LAYER);
        const std::vector<int64_t> shape{predicts ? stored_.images : 0, channels, height_,
                                         width_in_patches_};
        Tensor prediction = torch::stable::new_empty(image_, shape, ScalarType::Float);
        if (!predicts) return prediction;
        run_linear({layer});
        const float* const from = taps.const_data_ptr<float>();
        const float* const biases = bias.const_data_ptr<float>();
        float* const to = prediction.mutable_data_ptr<float>();
        parallel(stored_.images * height_, width_in_patches_ * weights.outputs(),
                 [&](int64_t begin, int64_t end) {
                     for (int64_t line = begin; line < end; ++line)
                         sum_taps(from, biases, channels, kernel, line, to);
                 });
        return prediction;
    }

    // One line of pixels of one image, all channels.
    void sum_taps(const float* taps, const float* bias, int64_t channels, int64_t kernel,
                  int64_t line, float* to) const {
        const int64_t image = line / height_, row = line % height_, width = width_in_patches_;
        const int64_t size = kernel * kernel, count = channels * size, reach = kernel / 2;
        for (int64_t c = 0; c < channels; ++c) {
            float* const out = to + ((image * channels + c) * height_ + row) * width;
            std::fill(out, out + width, bias[c]);
            for (int64_t i = std::max<int64_t>(0, reach - row);
                 i < std::min(kernel, height_ + reach - row); ++i) {
                const float* source = taps + ((image * height_ + row + i - reach) * width) * count +
                                      c * size + i * kernel;
                for (int64_t j = 0; j < kernel; ++j) {
                    const int64_t first = std::max<int64_t>(0, reach - j);
                    const int64_t last = std::min(width, width + reach - j);
                    for (int64_t x = first; x < last; ++x)
                        out[x] += source[(x + j - reach) * count + j];
                }
            }
        }
    }

    // y = x · Wᵀ + b (+ residual).
    Linear layer(const Rows& x, int64_t depth, const Rows& y, const Rows& residual) {
        const Weights weights = next_weights();
        STD_TORCH_CHECK(weights.depth == depth, "parameters: expected a layer of ", depth,
                        " inputs, got ", weights.depth);
        Linear found = linear(weights, tokens_, y, width_, false);
        set_input(found, {x}, depth, Norm::NONE);
        found.residual = residual;
        return found;
    }

    // A norm of the blocks and a linear layer.
    Linear normed(const Rows& x, const Rows& y, int64_t outputs, bool gated) {
        return normed_by(next_weights(), x, y, outputs, gated);
    }

    Linear normed_by(const Weights& weights, const Rows& x, const Rows& y, int64_t outputs,
                     bool gated) {
        STD_TORCH_CHECK(weights.depth == width_, "parameters: expected a layer of ", width_,
                        " inputs, got ", weights.depth);
        Linear found = linear(weights, tokens_, y, outputs, gated);
        set_input(found, {x}, width_, norm_);
        return found;
    }

    Linear linear(const Weights& weights, int64_t rows, const Rows& y, int64_t outputs,
                  bool gated) const {
        STD_TORCH_CHECK(weights.outputs() == outputs && weights.gated == gated,
                        "parameters: expected a layer of ", outputs, " outputs, got ",
                        weights.outputs());
        Linear found{};
        found.images = stored_.images;
        found.rows = rows;
        found.weights = weights;
        found.y = y;
        return found;
    }

    void set_input(Linear& layer, std::vector<Rows> pieces, int64_t piece_width, Norm norm) {
        layer.x = {nullptr, static_cast<int64_t>(pieces.size()), piece_width, norm, {}, {}};
        layer.x.pieces = pieces_.emplace_back(std::move(pieces)).data();
        const int64_t width = layer.x.count * piece_width;
        if (norm != Norm::NONE) layer.x.scale = next_values(width);
        if (norm == Norm::LAYER) layer.x.shift = next_values(width);
    }

    Weights next_weights() { return packed_weights(parameters_.next()); }

    Values next_values(int64_t width) {
        return times_.emplace_back(values_.next(), stored_.images, width, "values").view;
    }

    Tensor memory(int64_t rows, int64_t width) const {
        return torch::stable::new_empty(image_, {stored_.images, rows, width}, stored_.dtype);
    }

    static Rows rows_of(const Tensor& x) {
        return {x.mutable_data_ptr(), dtype_of(x, "x"), x.size(1) * x.size(2), x.size(2)};
    }

    const Tensor image_;
    const Stored& stored_;
    Queue values_, parameters_;
    const int64_t heads_;
    const Norm norm_;
    const int64_t tokens_, width_;
    int64_t height_ = 0, width_in_patches_ = 0, skipped_ = 0;  // class tokens
    // What the steps point to.
    std::list<TimeValues> times_;
    std::list<std::vector<Rows>> pieces_;
};

Tensor branch(const Tensor& image, const Tensor& first, const Tensor& pairs, const Tensor& last,
              const std::vector<Tensor>& lower, const std::optional<Tensor>& token,
              const std::vector<Tensor>& values, const std::vector<Tensor>& parameters,
              int64_t heads, bool layer_norm, bool predicts) {
    STD_TORCH_CHECK(image.dim() == 4 && image.is_cpu(), "image: expected [B, C, H, W] on the CPU");
    STD_TORCH_CHECK(lower.empty() || lower.size() == 3,
                    "lower: expected first, pairs and last, or none");
    STD_TORCH_CHECK(heads >= 0, "heads: expected 0 or more, got ", heads);
    const Stored stored(first, pairs, last);
    std::optional<Stored> below;
    if (!lower.empty()) below.emplace(lower[0], lower[1], lower[2]);
    return Branch(image, stored, values, parameters, heads, layer_norm).run(below, token, predicts);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dimr_fast, CPU, m) { m.impl("branch", TORCH_BOX(&branch)); }

}  // namespace dimr_fast
