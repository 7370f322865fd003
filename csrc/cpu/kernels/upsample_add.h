#pragma once

#include "rows.h"

namespace dimr_fast {

struct UpsampleAdd {
    Chunks chunks;           // of the boxes of q × q rows
    int64_t q, width;        // of a row
    int64_t boxes_in_width;  // of an image
    Rows x;                  // [images, rows, width]
    Rows projected;          // [images, boxes, q² * width]
    Values weight, bias;
    Rows out;            // as x, in the dtype of the sum of x and projected
    float *mean, *rstd;  // [images, rows]

    int64_t rows() const { return chunks.rows * q * q; }
};

struct UpsampleAddGrad {
    Chunks chunks;
    int64_t q, width, boxes_in_width;
    Rows dout;                   // [images, rows, width]
    Rows projected, dprojected;  // [images, boxes, q² * width]
    Values weight;
    const float *mean, *rstd;  // [images, rows]
    float* partial;            // [2, images, chunks, width], of weight and bias
    float* partial_sum;        // [images, chunks, q² * width], of dprojected

    int64_t rows() const { return chunks.rows * q * q; }
};

DIMR_FAST_DECLARE(void upsample_add(const UpsampleAdd& p, int64_t begin, int64_t end))
DIMR_FAST_DECLARE(void upsample_add_grad(const UpsampleAddGrad& p, int64_t begin, int64_t end))

}  // namespace dimr_fast
