"""The gate of the gated MLP: `gelu(a) · b` of rows `[a, b]`, with the exact (erf) GELU.

    gelu(a) = a · Φ(a)        y = gelu(a) · b
    da = dy · b · (Φ(a) + a · φ(a))        db = dy · gelu(a)

where Φ and φ are the normal distribution and its density. An element is read once and no statistic
is stored: per output element forward moves three elements (a, b, y), backward five (a, b, dy, da,
db), six if it also computes y again.
"""

import math

import torch
import triton
import triton.language as tl

from dimr_fast.kernels.configuration import configuration
from dimr_fast.kernels.fp8 import empty_fp8, store_fp8
from dimr_fast.kernels.rows import as_rows

_ROOT_HALF = tl.constexpr(math.sqrt(0.5))
_LOG2_E = tl.constexpr(math.log2(math.e))
_LOG2_DENSITY_AT_0 = tl.constexpr(-0.5 * math.log2(2 * math.pi))


def launch_fwd(x: torch.Tensor) -> torch.Tensor:
    """Return `gelu(a) · b` `[…, hidden]` of `x` `[…, 2·hidden]`."""
    hidden = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], hidden), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows = _rows(x)
    images, count = rows.shape[:2]
    constants = configuration("gated_gelu_fwd", hidden, x.device)
    tiles = triton.cdiv(count * hidden, constants["BLOCK"])
    _gated_gelu_fwd_kernel[(images * tiles,)](
        rows,
        y,
        count,
        tiles,
        (rows.stride(0), rows.stride(1)),
        HIDDEN=hidden,
        VECTOR=math.gcd(hidden, 16),
        **constants,
    )
    return y


def launch_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values `[…, hidden]` and the scales of `gelu(a) · b` in FP8."""
    hidden = x.shape[-1] // 2
    values, scales = empty_fp8(x, hidden)
    if values.numel() == 0:
        return values, scales
    rows = _rows(x)
    images, count = rows.shape[:2]
    constants = configuration("gated_gelu_fp8", hidden, x.device)
    _gated_gelu_fp8_kernel[(images * triton.cdiv(count, constants["ROWS"]),)](
        rows,
        values,
        scales,
        count,
        (rows.stride(0), rows.stride(1)),
        HIDDEN=hidden,
        BLOCK=triton.next_power_of_2(hidden),
        **constants,
    )
    return values, scales


def launch_bwd(
    dy: torch.Tensor, x: torch.Tensor, needs_y: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient `[…, 2·hidden]` of `x`, and the result again (empty if not needed).

    `dy` is the gradient of the result.
    """
    hidden = x.shape[-1] // 2
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(dy.shape if needs_y else (0,), dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return dx, y
    rows, dy_rows = _rows(x), _rows(dy)
    images, count = rows.shape[:2]
    constants = configuration("gated_gelu_bwd", hidden, x.device)
    tiles = triton.cdiv(count * hidden, constants["BLOCK"])
    _gated_gelu_bwd_kernel[(images * tiles,)](
        dy_rows,
        rows,
        dx,
        y,
        count,
        tiles,
        (dy_rows.stride(0), dy_rows.stride(1)),
        (rows.stride(0), rows.stride(1)),
        NEEDS_Y=needs_y,
        HIDDEN=hidden,
        VECTOR=math.gcd(hidden, 16),
        **constants,
    )
    return dx, y


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return `x` `[…, D]` as rows `[B, N, D]`; rows without a batch axis become one image."""
    return as_rows(x if x.dim() > 2 else x.reshape(1, -1, x.shape[-1]))


@triton.jit
def _tile(tiles, HIDDEN: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's image, and the row and the column of each of its elements.

    The rows of an image are tiled as one line of `count · HIDDEN` elements, so that only the last
    tile of an image has idle lanes, although HIDDEN is not a power of two. The division by HIDDEN
    is a 32-bit division by a constant, computed once for the elements of one vector load.
    """
    image = (tl.program_id(0) // tiles).to(tl.int64)
    start = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK
    # The alignment, which the compiler needs for vector loads, cannot be derived from a remainder.
    first = tl.multiple_of((start % HIDDEN).to(tl.int32), VECTOR)
    element = first + tl.arange(0, BLOCK)
    return image, start // HIDDEN + element // HIDDEN, element % HIDDEN


@triton.jit
def _normal_cdf(a, dtype: tl.constexpr):
    """Return Φ(a) in fp32, to the accuracy of the features' `dtype`.

    For fp32 it is computed by the library's erf. That compiles to 30 instructions per element, too
    many to keep up with a recent GPU's memory where an element is two bytes. Half precision uses a
    polynomial for log₂ Φ(−a) instead, fitted on 0 ≤ a ≤ 6 with the weight max(√Φ, 1e-4); beyond 6
    it decreases ever faster. The error of Φ is at most 2e-7 and, where Φ > 1e-9, at most 2e-3
    relative, a quarter of a rounding step of bf16.
    """
    if dtype == tl.float32:
        return 0.5 + 0.5 * tl.erf(a * _ROOT_HALF)
    size = tl.abs(a)
    log2_tail = -8.02842383e-07 * size + 1.35427336e-05
    log2_tail = log2_tail * size - 5.61708698e-05
    log2_tail = log2_tail * size - 0.000467581955
    log2_tail = log2_tail * size + 0.00751291318
    log2_tail = log2_tail * size - 0.0528130855
    log2_tail = log2_tail * size - 0.45910583
    log2_tail = log2_tail * size - 1.15111597
    log2_tail = log2_tail * size - 1.0
    tail = tl.exp2(log2_tail)
    return tl.where(a < 0, tail, 1.0 - tail)


@triton.jit
def _gated_gelu_fwd_kernel(
    x_ptr,  # [B, N, 2·HIDDEN]
    y_ptr,  # [B, N, HIDDEN], contiguous
    count,  # N
    tiles,  # of an image
    x_strides,  # (image, row)
    HIDDEN: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, row, column = _tile(tiles, HIDDEN, VECTOR, BLOCK)
    x_ptr += image * x_strides[0] + row * x_strides[1] + column
    a = tl.load(x_ptr, row < count, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + HIDDEN, row < count, other=0.0).to(tl.float32)
    y = a * _normal_cdf(a, x_ptr.dtype.element_ty) * b
    out = (image * count + row) * HIDDEN + column
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), row < count)


@triton.jit
def _gated_gelu_fp8_kernel(
    x_ptr,  # [B, N, 2·HIDDEN]
    values_ptr,  # [B, N, HIDDEN] e4m3, contiguous
    scales_ptr,  # [B, N] fp32
    count,  # N
    x_strides,  # (image, row)
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # a whole row
):
    blocks = tl.cdiv(count, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)
    inside = (row < count) & (column < HIDDEN)[None, :]
    x_ptr += image * x_strides[0] + row.to(tl.int64) * x_strides[1] + column
    a = tl.load(x_ptr, inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + HIDDEN, inside, other=0.0).to(tl.float32)
    y = a * _normal_cdf(a, x_ptr.dtype.element_ty) * b
    first = image * count  # row of the outputs
    store_fp8(values_ptr + first * HIDDEN, scales_ptr + first, y, row, column, count, HIDDEN)


@triton.jit
def _gated_gelu_bwd_kernel(
    dy_ptr,  # [B, N, HIDDEN]
    x_ptr,  # [B, N, 2·HIDDEN]
    dx_ptr,  # [B, N, 2·HIDDEN], contiguous
    y_ptr,  # [B, N, HIDDEN], contiguous
    count,  # N
    tiles,  # of an image
    dy_strides,  # (image, row)
    x_strides,  # (image, row)
    NEEDS_Y: tl.constexpr,
    HIDDEN: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, row, column = _tile(tiles, HIDDEN, VECTOR, BLOCK)
    x_ptr += image * x_strides[0] + row * x_strides[1] + column
    dy_ptr += image * dy_strides[0] + row * dy_strides[1] + column
    a = tl.load(x_ptr, row < count, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + HIDDEN, row < count, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr, row < count, other=0.0).to(tl.float32)
    cdf = _normal_cdf(a, x_ptr.dtype.element_ty)
    density = tl.exp2(a * a * (-0.5 * _LOG2_E) + _LOG2_DENSITY_AT_0)
    da = dy * b * (cdf + a * density)
    db = dy * a * cdf
    dx_ptr += (image * count + row) * (2 * HIDDEN) + column
    tl.store(dx_ptr, da.to(dx_ptr.dtype.element_ty), row < count)
    tl.store(dx_ptr + HIDDEN, db.to(dx_ptr.dtype.element_ty), row < count)
    if NEEDS_Y:
        y = (a * cdf * b).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + (image * count + row) * HIDDEN + column, y, row < count)
