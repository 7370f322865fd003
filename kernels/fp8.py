"""Code that the quantising kernels share: rows are stored as e4m3 with one scale each."""

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def empty_fp8(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return empty e4m3 values `[…, width]` and fp32 scales `[…, 1]` for the rows of `x`."""
    rows = x.shape[:-1]
    values = torch.empty((*rows, width), dtype=torch.float8_e4m3fn, device=x.device)
    return values, torch.empty((*rows, 1), dtype=torch.float32, device=x.device)


@triton.jit
def store_fp8(values_ptr, scales_ptr, y, row, column, count, WIDTH: tl.constexpr):
    """Store whole rows `y`, zero outside of them, from row `row` `[ROWS, 1]` of an image.

    The pointers are those of the image's first row. The arithmetic is `reference.quantize_fp8`.
    """
    scale = tl.maximum(tl.max(tl.abs(y), 1), 1e-12)[:, None] * (1.0 / 448.0)
    tl.store(scales_ptr + row, scale, row < count)
    y = y * (1.0 / scale)
    if INTERPRETED:
        y = _rounded(y)
    inside = (row < count) & (column < WIDTH)[None, :]
    tl.store(values_ptr + row.to(tl.int64) * WIDTH + column, y.to(tl.float8e4nv), inside)


@triton.jit
def _rounded(y):
    """Round to multiples of the e4m3 step, in fp32.

    Triton's interpreter casts a number that rounds up to a power of two to half of that power.
    """
    step = tl.exp2(tl.floor(tl.log2(tl.maximum(tl.abs(y), 0.015625))) - 3.0)
    return (y / step + 12582912.0 - 12582912.0) * step  # 1.5 · 2²³: fp32 without fraction bits
