// Linear layers with a norm before and a residual add or a gated GELU after them.
//
// The rows of a task are normed and converted to the elements of the left factor, in scratch
// memory. Then the task goes through the panels of the weights: the sums of a panel's columns stay
// in the L1 cache, where the bias, the residual or the gated GELU follow. The summed axis is cut so
// that both factors stay in the L2 cache while all rows use them.
//
// Each number of y is summed by one task in the order of the summed axis, so results do not depend
// on how rows are split into tasks.

#include "linear.h"

#include "columns.h"
#include "exponential.h"
#include "products.h"

#if defined(DIMR_FAST_AMX)
#include "amx.h"
#endif

namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET {
namespace {

// The most elements that are summed at a time. Shorter sums of fp32 numbers lose less to rounding.
template <typename P>
constexpr int64_t DEPTH_OF_BLOCK = P::DEPTH == 1 ? 256 : 1024;

// A row of x, normed, as fp32 numbers: `emit(column, value, lanes)`.
template <typename X, typename Emit>
inline void norm_row(const LinearInput& x, int64_t image, int64_t row, float* wide, Emit emit) {
    const int64_t width = x.count * x.piece_width;
    const auto each_piece = [&](auto function) {
        for (int64_t i = 0; i < x.count; ++i)
            function(row_of<const X>(x.pieces[i], image, row), i * x.piece_width);
    };
    using enum LinearInput::Norm;
    const float* scale = x.scale.data + image * x.scale.image_stride;
    const float* shift = x.shift.data + image * x.shift.image_stride;
    if (x.norm == NONE) {
        each_piece([&](const X* from, int64_t offset) {
            columns(x.piece_width,
                    [&](int64_t c, auto lanes) { emit(offset + c, load(from + c, lanes), lanes); });
        });
    } else if (x.norm == RMS) {
        Vector squares[1] = {};
        each_piece([&](const X* from, int64_t) {
            accumulate(x.piece_width, squares, [&](Vector(&sums)[1], int64_t c, auto lanes) {
                const Vector value = load(from + c, lanes);
                sums[0] += value * value;
            });
        });
        const Vector r = broadcast(1 / (__builtin_sqrtf(sum(squares[0]) / width) + 1e-8f));
        each_piece([&](const X* from, int64_t offset) {
            columns(x.piece_width, [&](int64_t c, auto lanes) {
                emit(offset + c, load(from + c, lanes) * r * load(scale + offset + c, lanes),
                     lanes);
            });
        });
    } else {
        Vector total[1] = {};
        each_piece([&](const X* from, int64_t offset) {
            accumulate(x.piece_width, total, [&](Vector(&sums)[1], int64_t c, auto lanes) {
                const Vector value = load(from + c, lanes);
                store(wide + offset + c, value, lanes);
                sums[0] += value;
            });
        });
        const float mean = sum(total[0]) / width;
        Vector deviations[2] = {};
        accumulate(width, deviations, [&](Vector(&sums)[2], int64_t c, auto lanes) {
            const Vector centred = keep(load(wide + c, lanes) - mean, lanes);
            sums[0] += centred;
            sums[1] += centred * centred;
        });
        // The error of the mean, from rounding a long sum of large numbers.
        const float lost = sum(deviations[0]) / width;
        const float variance = sum(deviations[1]) / width - lost * lost;
        const Vector centre = broadcast(mean + lost);
        const Vector rstd = broadcast(1 / __builtin_sqrtf(variance + 1e-5f));
        columns(width, [&](int64_t c, auto lanes) {
            const Vector normed = (load(wide + c, lanes) - centre) * rstd;
            emit(c, normed * load(scale + c, lanes) + load(shift + c, lanes), lanes);
        });
    }
}

template <typename X>
inline void read_patch(const Patches& p, int64_t depth, int64_t image, int64_t row, float* to) {
    const X* corner = static_cast<const X*>(p.images) + image * p.image_stride +
                      row / p.in_width * p.side * p.line_stride +
                      row % p.in_width * p.side * p.column_stride;
    for (const float* end = to + depth; to < end; corner += p.channel_stride)
        for (int64_t i = 0; i < p.side; ++i)
            for (int64_t j = 0; j < p.side; ++j) {
                const X lanes[LANES] = {corner[i * p.line_stride + j * p.column_stride]};
                *to++ = load(lanes)[0];
            }
}

// The largest magnitude of a row.
class Magnitude {
  public:
    void add(Vector value) {
        most_ = larger(absolute(value), most_);
        damage_ += value - value;  // zero, but NaN for numbers that are not finite
    }
    float value() const { return largest(most_) + sum(damage_); }

  private:
    Vector most_{}, damage_{};
};

// Writes a row of fp32 numbers as integers from 1 to 255, 128 for zero, so that `most` is 255;
// returns the factor that turns them back.
inline float quantise(const float* from, int64_t count, float most, uint8_t* to) {
    const Vector factor = broadcast(most > 0 ? 127 / most : 0);
    columns(count, [&](int64_t c, auto lanes) {
        // The last bit of the sum has the value one: its low bits are the nearest integer.
        const Vector shifted = load(from + c, lanes) * factor + 0x1.8p23f;
        const Bytes bytes = lowest_bytes(bits_as<Bits>(shifted) + 128u);
        if constexpr (__is_same(decltype(lanes), All))
            write(to + c, bytes);
        else
            __builtin_memcpy(to + c, &bytes, lanes);
    });
    for (int64_t k = count; k % 4; ++k) to[k] = 128;
    return most / 127;
}

// The arrays in scratch memory; each starts at a cache line.
template <typename P>
struct Memory {
    typename P::Element* left;  // [LINEAR_ROWS, elements]
    float* sums;                // [LINEAR_ROWS, PANEL]
    float* scales;              // [LINEAR_ROWS]
    float* wide;                // a row of fp32 numbers
};

template <typename P, typename X>
void read_rows(const Linear& p, int64_t first, int64_t rows, const Memory<P>& memory) {
    const int64_t depth = p.weights.depth, elements = p.weights.elements();
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t image = (first + r) / p.rows, row = (first + r) % p.rows;
        // Calls `emit(column, value, lanes)` for the row.
        const auto each = [&](auto emit) {
            if (!p.patches.images) return norm_row<X>(p.x, image, row, memory.wide, emit);
            read_patch<X>(p.patches, depth, image, row, memory.wide);
            columns(depth,
                    [&](int64_t c, auto lanes) { emit(c, load(memory.wide + c, lanes), lanes); });
        };
        typename P::Element* to = memory.left + r * elements;
        if constexpr (P::DEPTH == 4) {
            Magnitude magnitude;
            each([&](int64_t c, Vector value, auto lanes) {
                store(memory.wide + c, value, lanes);
                magnitude.add(keep(value, lanes));
            });
            memory.scales[r] =
                quantise(memory.wide, depth, magnitude.value(), reinterpret_cast<uint8_t*>(to));
        } else if constexpr (P::DEPTH == 2) {
            auto* numbers = reinterpret_cast<BFloat16*>(to);
            each([&](int64_t c, Vector value, auto lanes) { store(numbers + c, value, lanes); });
            if (depth % 2) numbers[depth] = {};
        } else {
            each([&](int64_t c, Vector value, auto lanes) { store(to + c, value, lanes); });
        }
    }
}

// Three numbers of each column: bias, scale, and the integer 128 · Σ weights.
struct ColumnValues {
    const float *bias, *scale;
    const int32_t* offset;

    ColumnValues(const Weights& w, int64_t panel) {
        const int64_t columns = w.panels() * PANEL;
        bias = static_cast<const float*>(w.data) + columns * w.elements() + panel * PANEL;
        scale = bias + columns;
        offset = reinterpret_cast<const int32_t*>(scale + columns);
    }
};

// A vector of sums as numbers, with the bias.
template <typename P>
inline Vector finished(const float* sums, float row_scale, const ColumnValues& values, int64_t c) {
    const Vector bias = load(values.bias + c);
    if constexpr (P::DEPTH == 4) {
        // Unsigned, because the sum may have overflowed.
        const auto exact = (Integers)(read<Bits>(sums + c) - read<Bits>(values.offset + c));
        return __builtin_convertvector(exact, Vector) * (load(values.scale + c) * row_scale) + bias;
    } else {
        return load(sums + c) + bias;
    }
}

template <typename P, typename Y>
void write_rows(const Linear& p, int64_t panel, int64_t first, int64_t rows, const float* sums,
                const float* scales) {
    const ColumnValues values(p.weights, panel);
    const int64_t count = p.weights.outputs_of_panel(), offset = panel * count;
    const int64_t left = p.weights.outputs() - offset, width = left < count ? left : count;
    constexpr bool WIDE = sizeof(Y) == sizeof(float);
    for (int64_t r = 0; r < rows; ++r, sums += PANEL) {
        const int64_t image = (first + r) / p.rows, row = (first + r) % p.rows;
        Y* y = row_of<Y>(p.y, image, row) + offset;
        const float scale = scales[r];
        if (p.weights.gated) {
            columns(width, [&](int64_t c, auto lanes) {
                const Vector a = finished<P>(sums, scale, values, c);
                const Vector b = finished<P>(sums, scale, values, PANEL / 2 + c);
                store(y + c, a * normal_cdf<WIDE>(a) * b, lanes);
            });
        } else if (p.residual.data) {
            const Y* residual = row_of<const Y>(p.residual, image, row) + offset;
            columns(width, [&](int64_t c, auto lanes) {
                store(y + c, finished<P>(sums, scale, values, c) + load(residual + c, lanes),
                      lanes);
            });
        } else {
            columns(width, [&](int64_t c, auto lanes) {
                store(y + c, finished<P>(sums, scale, values, c), lanes);
            });
        }
    }
}

// The products of up to ROWS rows. `product<P, ADDS>` has the arguments of products.h.
template <typename P>
struct Vectors {
    static constexpr int64_t ROWS_OF_TILE = ROWS;
    explicit Vectors(const Weights&) {}
    template <bool ADDS, typename... Arguments>
    void product(Arguments... arguments) const {
        DIMR_FAST_INSTRUCTION_SET::product<P, ADDS>(arguments...);
    }
};

template <typename P>
struct Multiplier : Vectors<P> {
    using Vectors<P>::Vectors;
};

#if defined(DIMR_FAST_AMX)
template <typename P>
struct TileMultiplier {
    static constexpr int64_t ROWS_OF_TILE = Tiles::ROWS;
    Tiles tiles;
    explicit TileMultiplier(const Weights& w) : tiles(w.elements()) {}
    template <bool ADDS, typename... Arguments>
    void product(Arguments... arguments) const {
        tile_product<P, ADDS>(arguments...);
    }
};

// AMX multiplies no fp32 numbers.
template <>
struct Multiplier<Pairs> : TileMultiplier<Pairs> {
    using TileMultiplier::TileMultiplier;
};
template <>
struct Multiplier<Quadruples> : TileMultiplier<Quadruples> {
    using TileMultiplier::TileMultiplier;
};
#endif

template <typename P, typename Y>
void multiply(const Linear& p, int64_t first, int64_t rows, const Memory<P>& memory) {
    const Weights& w = p.weights;
    const int64_t elements = w.elements(), outputs = w.outputs_of_panel();
    const Multiplier<P> multiplier(w);
    constexpr int64_t STEP = Multiplier<P>::ROWS_OF_TILE;
    for (int64_t panel = 0; panel < w.panels(); ++panel) {
        const auto* right =
            static_cast<const typename P::Element*>(w.data) + panel * PANEL * elements;
        // The last panel may be partly empty.
        const int64_t rest = w.outputs() - panel * outputs;
        const int64_t used = w.gated || rest >= PANEL ? PANEL : round_up(rest, LANES);
        for (int64_t k = 0; k < elements; k += DEPTH_OF_BLOCK<P>) {
            const int64_t depth =
                elements - k < DEPTH_OF_BLOCK<P> ? elements - k : DEPTH_OF_BLOCK<P>;
            for (int64_t r = 0; r < rows; r += STEP) {
                const int64_t count = rows - r < STEP ? rows - r : STEP;
                const auto* left = memory.left + r * elements + k;
                float* sums = memory.sums + r * PANEL;
                if (k == 0)
                    multiplier.template product<false>(count, left, elements, right, PANEL, depth,
                                                       used, sums, PANEL);
                else
                    multiplier.template product<true>(count, left, elements, right + k * PANEL,
                                                      PANEL, depth, used, sums, PANEL);
                if (k + depth == elements)
                    write_rows<P, Y>(p, panel, first + r, count, sums, memory.scales + r);
            }
        }
    }
}

template <typename Function>
void with_products(Factors factors, Function function) {
    switch (factors) {
        case Factors::FLOAT32:
            return function(static_cast<Single*>(nullptr));
        case Factors::BFLOAT16:
            return function(static_cast<Pairs*>(nullptr));
        case Factors::INT8:
            return function(static_cast<Quadruples*>(nullptr));
    }
}

// Column `c` of panel `panel`, or -1 where the panel is empty.
int64_t column_of(const Weights& w, int64_t panel, int64_t c) {
    const int64_t count = w.outputs_of_panel(), output = panel * count + c % count;
    return output < w.outputs() ? output + c / count * w.outputs() : -1;
}

}  // namespace

void pack_linear(const Weights& w, const float* weight, const float* bias) {
    const int64_t columns = w.panels() * PANEL, elements = w.elements(), numbers = w.numbers();
    auto* to = static_cast<char*>(w.data);
    float* biases = reinterpret_cast<float*>(to) + columns * elements;
    float* scales = biases + columns;
    auto* offsets = reinterpret_cast<int32_t*>(scales + columns);
    __builtin_memset(to, 0, w.bytes());
    for (int64_t panel = 0; panel < w.panels(); ++panel)
        for (int64_t c = 0; c < PANEL; ++c) {
            const int64_t column = column_of(w, panel, c);
            if (column < 0) continue;
            const float* from = weight + column * w.depth;
            float most = 0;
            for (int64_t k = 0; k < w.depth; ++k) {
                const float size = __builtin_fabsf(from[k]);
                most = size > most || size != size ? size : most;
            }
            const float inverse = most > 0 ? 127 / most : 0;
            int64_t total = 0;
            for (int64_t k = 0; k < w.depth; ++k) {
                char* place = to + 4 * ((panel * elements + k / numbers) * PANEL + c) +
                              4 / numbers * (k % numbers);
                if (w.factors == Factors::FLOAT32) {
                    write(place, from[k]);
                } else if (w.factors == Factors::BFLOAT16) {
                    BFloat16 lanes[LANES];
                    store(lanes, broadcast(from[k]));
                    write(place, lanes[0]);
                } else {
                    const float whole = from[k] * inverse + 0x1.8p23f - 0x1.8p23f;
                    const int64_t integer = whole == whole ? static_cast<int64_t>(whole) : 0;
                    write(place, static_cast<int8_t>(integer));
                    total += integer;
                }
            }
            const int64_t at = panel * PANEL + c;
            biases[at] = bias ? bias[column] : 0;
            scales[at] = most / 127;
            offsets[at] = static_cast<int32_t>(128 * total);
        }
}

int64_t linear_tile_rows(const Weights& w) {
    int64_t rows = 0;
    with_products(w.factors, [&]<typename P>(P*) { rows = Multiplier<P>::ROWS_OF_TILE; });
    return rows;
}

int64_t linear_scratch(const Weights& w) {
    const int64_t left = round_up(LINEAR_ROWS * w.elements(), 16) + LINEAR_ROWS * PANEL;
    return 4 * (left + round_up(LINEAR_ROWS, 16) + round_up(w.depth, 16));
}

void linear(const Linear& p, int64_t begin, int64_t end, void* scratch) {
    with_products(p.weights.factors, [&]<typename P>(P*) {
        float* next = static_cast<float*>(scratch);
        const auto take = [&](int64_t count) {
            float* from = next;
            next += round_up(count, 16);
            return from;
        };
        Memory<P> memory;
        memory.left =
            reinterpret_cast<typename P::Element*>(take(LINEAR_ROWS * p.weights.elements()));
        memory.sums = take(LINEAR_ROWS * PANEL);
        memory.scales = take(LINEAR_ROWS);
        memory.wide = take(p.weights.depth);
        with_type(p.patches.images ? p.patches.dtype : p.x.pieces->dtype,
                  [&]<typename X>(X*) { read_rows<P, X>(p, begin, end - begin, memory); });
        with_type(p.y.dtype,
                  [&]<typename Y>(Y*) { multiply<P, Y>(p, begin, end - begin, memory); });
    });
}

}  // namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET
