#include "rows.h"

#include "columns.h"

namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET {

void sum_partials(const float* partial, float* total, int64_t count, int64_t width, int64_t begin,
                  int64_t end) {
    const int64_t blocks = (width + SUM_COLUMNS - 1) / SUM_COLUMNS;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t time = task / blocks, first = task % blocks * SUM_COLUMNS;
        const float* from = partial + time * count * width + first;
        float* to = total + time * width + first;
        const int64_t rest = width - first;
        columns(rest < SUM_COLUMNS ? rest : SUM_COLUMNS, [&](int64_t c, auto lanes) {
            Vector sum{};
            for (int64_t i = 0; i < count; ++i) sum += load(from + i * width + c, lanes);
            store(to + c, sum, lanes);
        });
    }
}

void add(const Rows& a, const Rows& b, const Rows& out, const Chunks& chunks, int64_t width,
         int64_t begin, int64_t end) {
    with_type(a.dtype, [&]<typename T>(T*) {
        each_chunk(chunks, begin, end, [&](int64_t image, int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) {
                const T *left = row_of<const T>(a, image, row),
                        *right = row_of<const T>(b, image, row);
                T* to = row_of<T>(out, image, row);
                columns(width, [&](int64_t c, auto lanes) {
                    store(to + c, load(left + c, lanes) + load(right + c, lanes), lanes);
                });
            }
        });
    });
}

void widen(DType dtype, const void* from, float* to, int64_t width) {
    with_type(dtype, [&]<typename T>(T*) {
        columns(width, [&](int64_t c, auto lanes) {
            store(to + c, load(static_cast<const T*>(from) + c, lanes), lanes);
        });
    });
}

}  // namespace dimr_fast::DIMR_FAST_INSTRUCTION_SET
