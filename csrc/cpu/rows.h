// Features as kernels see them: rows of neighbouring numbers, without torch.
#pragma once

#include "dtypes.h"

namespace dimr_fast {

struct Rows {
    void* data;
    DType dtype;
    int64_t images, count, width;      // `count` rows of `width` in each image
    int64_t image_stride, row_stride;  // in elements

    int64_t size() const { return images * count; }

    // The row numbered `row` of all.
    template <typename T>
    T* at(int64_t row) const {
        return static_cast<T*>(data) + row / count * image_stride + row % count * row_stride;
    }
};

}  // namespace dimr_fast
