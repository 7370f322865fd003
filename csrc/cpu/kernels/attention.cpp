// Softmax attention of every token to every token, with scale head_dim^-1/2.
//
// A task copies the keys of one head, transposed, and its values to scratch memory, where both
// stay in the cache. It then takes a few queries at a time: their scores, their softmax and the
// weighted sum of the values never leave the L1 cache. Both products are those of products.h.
//
// With AVX-512 BF16 and bf16 inputs, a multiplication takes pairs of numbers, and the softmax
// weights are rounded to bf16 before the second product. Otherwise all arithmetic is fp32.

#include "attention.h"

#include "columns.h"
#include "exponential.h"
#include "products.h"

namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET {
namespace {

// How numbers become elements of the products' factors.
struct Numbers : Single {
    static void write(float* row, int64_t c, Vector value) { store(row + c, value); }

    // Copies LANES numbers of a row of `width` from column `c`; zero after the last.
    template <typename T>
    static void copy_values(const T* row, const T*, int64_t c, int64_t width, float* to) {
        const int64_t count = width - c < LANES ? width - c : LANES;
        store(to, count == LANES ? load(row + c) : load(row + c, count));
    }
};

#if defined(__AVX512BF16__)
struct BFloat16Pairs : Pairs {
    static void write(uint32_t* row, int64_t c, Vector value) {
        store(reinterpret_cast<BFloat16*>(row) + c, value);
    }

    // Copies pairs of numbers, each from `row` and from `next`, which may be null (zeros).
    static void copy_values(const BFloat16* row, const BFloat16* next, int64_t c, int64_t width,
                            uint32_t* to) {
        const int64_t count = width - c < LANES ? width - c : LANES;
        Bits pairs = numbers(row + c, count);
        if (next) pairs |= numbers(next + c, count) << 16;
        _mm512_storeu_si512(to, (__m512i)pairs);
    }

  private:
    static Bits numbers(const BFloat16* from, int64_t count) {
        return (Bits)_mm512_cvtepu16_epi32(
            _mm256_maskz_loadu_epi16(first(count), (const void*)from));
    }
};
#endif

// The sizes of a task's arrays in scratch memory, in elements of P.
template <typename P>
struct Layout {
    explicit Layout(const Attention& p)
        : head_depth((p.head_dim + P::DEPTH - 1) / P::DEPTH),
          token_depth((p.tokens + P::DEPTH - 1) / P::DEPTH),
          tokens(round_up(p.tokens, LANES)),
          width(round_up(p.head_dim, LANES)) {}

    int64_t head_depth, token_depth;  // elements of a row of queries, of weights
    int64_t tokens, width;            // columns of scores, of values

    int64_t keys() const { return head_depth * tokens; }
    int64_t values() const { return token_depth * width; }
    int64_t queries() const { return ROWS * head_depth; }
    int64_t weights() const { return ROWS * tokens; }
    int64_t scores() const { return ROWS * tokens; }
    int64_t sums() const { return ROWS * width; }
    int64_t bytes() const {
        return 4 * (keys() + values() + round_up(queries(), 16) + weights() + scores() + sums());
    }
};

template <typename P, typename T>
class Task {
  public:
    Task(const Attention& p, void* scratch) : p_(p), size_(p) {
        auto* next = static_cast<uint32_t*>(scratch);
        const auto take = [&](int64_t count) {
            uint32_t* const from = next;
            next += round_up(count, 16);
            return from;
        };
        values_ = reinterpret_cast<Element*>(take(size_.values()));
        keys_ = reinterpret_cast<Element*>(take(size_.keys()));
        weights_ = reinterpret_cast<Element*>(take(size_.weights()));
        scores_ = reinterpret_cast<float*>(take(size_.scores()));
        sums_ = reinterpret_cast<float*>(take(size_.sums()));
        queries_ = reinterpret_cast<Element*>(take(size_.queries()));
    }

    void run(int64_t image, int64_t head, int64_t first, int64_t last) {
        copy_keys_and_values(image, head);
        for (int64_t row = first; row < last; row += ROWS)
            attend(image, head, row, last - row < ROWS ? last - row : ROWS);
    }

  private:
    using Element = typename P::Element;

    // Row `token` of q, k or v (0, 1 or 2) of a head.
    const T* vector(int64_t image, int64_t head, int64_t token, int64_t which) const {
        return row_of<const T>(p_.qkv, image, token) + (which * p_.heads + head) * p_.head_dim;
    }

    static float number(T value) {
        T lanes[LANES] = {value};
        return load(lanes)[0];
    }

    // Element `k` of a row of `count` numbers; numbers after the last are zero.
    static Element element(const T* row, int64_t k, int64_t count) {
        if constexpr (P::DEPTH == 1) {
            return number(row[k]);
        } else {
            uint16_t pair[2] = {};
            __builtin_memcpy(pair, row + 2 * k, (count - 2 * k < 2 ? 1 : 2) * sizeof(T));
            return read<uint32_t>(pair);
        }
    }

    void copy_keys_and_values(int64_t image, int64_t head) {
        const int64_t count = p_.tokens, width = p_.head_dim;
        const int64_t stride = p_.qkv.row_stride;
        // Token by token: the rows of `keys_` that it writes to stay in the L1 cache.
        for (int64_t token = 0; token < count; ++token) {
            const T* key = vector(image, head, token, 1);
            for (int64_t k = 0; k < size_.head_depth; ++k)
                keys_[k * size_.tokens + token] = element(key, k, width);
        }
        for (int64_t k = 0; k < size_.head_depth; ++k)
            for (int64_t token = count; token < size_.tokens; ++token)
                keys_[k * size_.tokens + token] = Element{};
        for (int64_t k = 0; k < size_.token_depth; ++k) {
            const T* value = vector(image, head, P::DEPTH * k, 2);
            const T* next = P::DEPTH * k + 1 < count ? value + stride : nullptr;
            for (int64_t d = 0; d < size_.width; d += LANES)
                P::copy_values(value, next, d, width, values_ + k * size_.width + d);
        }
    }

    // The output of `rows` queries from `first`.
    void attend(int64_t image, int64_t head, int64_t first, int64_t rows) {
        for (int64_t r = 0; r < rows; ++r) {
            const T* query = vector(image, head, first + r, 0);
            for (int64_t k = 0; k < size_.head_depth; ++k)
                queries_[r * size_.head_depth + k] = element(query, k, p_.head_dim);
        }
        product<P, false>(rows, queries_, size_.head_depth, keys_, size_.tokens, size_.head_depth,
                          size_.tokens, scores_, size_.tokens);
        float inverse[ROWS];
        for (int64_t r = 0; r < rows; ++r) inverse[r] = 1 / softmax(image, head, first + r, r);
        product<P, false>(rows, weights_, size_.tokens, values_, size_.width, size_.token_depth,
                          size_.width, sums_, size_.width);
        for (int64_t r = 0; r < rows; ++r) {
            T* y = row_of<T>(p_.y, image, first + r) + head * p_.head_dim;
            const float* sum = sums_ + r * size_.width;
            const Vector factor = broadcast(inverse[r]);
            columns(p_.head_dim, [&](int64_t c, auto lanes) {
                store(y + c, load(sum + c, lanes) * factor, lanes);
            });
        }
    }

    // Writes the exponentials of a row of scores to the weights; returns their sum.
    float softmax(int64_t image, int64_t head, int64_t query, int64_t r) {
        const float* scores = scores_ + r * size_.tokens;
        Element* weights = weights_ + r * size_.tokens;
        const float scale = 1 / __builtin_sqrtf(static_cast<float>(p_.head_dim));
        const float most = largest_of(scores, p_.tokens);
        const Vector factor = broadcast(scale * LOG2_E), shift = broadcast(most * scale * LOG2_E);
        Vector total[1] = {};
        for (int64_t c = 0; c < size_.tokens; c += LANES) {
            Vector value = exp2<sizeof(T) == 4>(load(scores + c) * factor - shift);
            if (c + LANES > p_.tokens) value = keep(value, p_.tokens - c);
            P::write(weights, c, value);
            total[0] += value;
        }
        const float sum_of_row = sum(total[0]);
        float* statistics = p_.statistics + ((image * p_.heads + head) * 2) * p_.tokens + query;
        statistics[0] = most * scale * LOG2_E;
        statistics[p_.tokens] = 1 / sum_of_row;
        return sum_of_row;
    }

    static float largest_of(const float* scores, int64_t count) {
        Vector most = broadcast(scores[0]);
        int64_t c = 0;
        for (; c + LANES <= count; c += LANES) most = larger(load(scores + c), most);
        float found = largest(most);
        for (; c < count; ++c) found = scores[c] > found ? scores[c] : found;
        return found;
    }

    const Attention& p_;
    const Layout<P> size_;
    Element *keys_, *values_, *queries_, *weights_;
    float *scores_, *sums_;
};

template <typename P, typename T>
void run(const Attention& p, int64_t begin, int64_t end, void* scratch) {
    Task<P, T> task(p, scratch);
    const int64_t share = (p.tokens + p.splits - 1) / p.splits;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / p.splits % p.heads, image = i / p.splits / p.heads;
        const int64_t first = i % p.splits * share;
        task.run(image, head, first, first + share < p.tokens ? first + share : p.tokens);
    }
}

}  // namespace

int64_t attention_scratch(const Attention& p) {
    // Without pairs the arrays are at least as large; each array starts at a cache line.
    return Layout<Numbers>(p).bytes() + 6 * 64;
}

void attention(const Attention& p, int64_t begin, int64_t end, void* scratch) {
    with_type(p.qkv.dtype, [&]<typename T>(T*) {
#if defined(__AVX512BF16__)
        if constexpr (__is_same(T, BFloat16)) return run<BFloat16Pairs, T>(p, begin, end, scratch);
#endif
        return run<Numbers, T>(p, begin, end, scratch);
    });
}

}  // namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET
