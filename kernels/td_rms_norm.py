"""RMS norm with a time-dependent scale, fused with the residual add before it.

    s = x + residual        r = 1 / (rms(s) + 1e-8)        y = s · r · scale

and backward, with g = dy · scale and the gradient ds of the sum s:

    dx = g·r − s · r² · mean(g·s) / rms + ds        dscale = Σ_rows dy · s · r

A row that fits a block is read once and kept in registers; a wider row is read a second time, from
the L2 cache. Forward moves x, residual, sum and y once, backward s, dy, ds, dx and, if it computes
y again, y. norms.md gives the reasons.
"""

import torch
import triton
import triton.language as tl

from dimr_fast.kernels.configuration import configuration
from dimr_fast.kernels.fp8 import empty_fp8, store_fp8
from dimr_fast.kernels.rows import (
    as_rows,
    as_values,
    as_written_rows,
    chunks,
    load_sum,
    sum_partials,
)

BACKWARD_WARPS = 4096
"""The most warps of a backward pass: with 64 registers per thread an H100 runs all at once."""


def launch_fwd(
    x: torch.Tensor, residual: torch.Tensor | None, scale: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sum (empty without residual), the normed sum in `dtype` and the rms `[B, N]`."""
    summed = x.new_empty(0, dtype=dtype)
    if residual is not None:
        summed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    y, rms = _launch_fwd(x, residual, scale, dtype, summed, None)
    return summed, y, rms


def launch_into(
    out: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    scale: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """Write the sum plus `bias` `[D]` to `out` `[B, …, D]`; return the normed sum in `x.dtype`."""
    return _launch_fwd(x, residual, scale, x.dtype, out, bias)[0]


def launch_fp8(
    x: torch.Tensor, residual: torch.Tensor | None, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sum (empty without residual), and the values and scales of its norm in FP8."""
    values, scales = empty_fp8(x, x.shape[-1])
    summed = x.new_empty(0)
    if residual is not None:
        summed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    if x.numel() == 0:
        return summed, values, scales
    rows = as_rows(x)
    scale, scale_stride = as_values(scale)
    images, count, width = rows.shape
    added = rows if residual is None else as_rows(residual)
    constants = configuration("td_rms_norm_fp8", width, x.device)
    _td_rms_norm_fp8_kernel[(images * triton.cdiv(count, constants["ROWS"]),)](
        rows,
        added,
        scale,
        summed,
        values,
        scales,
        count,
        (rows.stride(0), rows.stride(1)),
        (added.stride(0), added.stride(1)),
        scale_stride,
        HAS_RESIDUAL=residual is not None,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        **constants,
    )
    return summed, values, scales


def _launch_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    scale: torch.Tensor,
    dtype: torch.dtype,
    summed: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the sum to `summed` unless it is empty; return the normed sum and its rms."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows = as_rows(x)
    scale, scale_stride = as_values(scale)
    images, count, width = rows.shape
    rms = torch.empty(images, count, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, rms
    added = rows if residual is None else as_rows(residual)
    sums = as_written_rows(summed) if summed.numel() else rows
    constants = dict(configuration("td_rms_norm_fwd", width, x.device))
    constants["BLOCK"] = min(constants["BLOCK"], triton.next_power_of_2(width))
    _td_rms_norm_fwd_kernel[(images * triton.cdiv(count, constants["ROWS"]),)](
        rows,
        added,
        scale,
        y if bias is None else bias,
        sums,
        y,
        rms,
        count,
        (rows.stride(0), rows.stride(1)),
        (added.stride(0), added.stride(1)),
        (sums.stride(0), sums.stride(1)),
        scale_stride,
        HAS_RESIDUAL=residual is not None,
        HAS_SUM=summed.numel() > 0,
        HAS_BIAS=bias is not None,
        WIDTH=width,
        **constants,
    )
    return y, rms


def launch_bwd(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    x: torch.Tensor,
    scale: torch.Tensor,
    rms: torch.Tensor,
    needs_y: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of the sum and of `scale` `[T, D]`, and y; `x` is the normed sum.

    y is computed again, in the dtype of `dy`; it is empty if it is not needed.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(dy.shape if needs_y else (0,), dtype=dy.dtype, device=x.device)
    rows = as_rows(x)
    scale, scale_stride = as_values(scale)
    images, count, width = rows.shape
    if x.numel() == 0:
        return dx, torch.zeros(scale.shape, dtype=torch.float32, device=x.device), y
    dy_rows = as_rows(dy)
    dsum_rows = dy_rows if dsum is None else as_rows(dsum)
    constants = dict(configuration("td_rms_norm_bwd", width, x.device))
    constants["BLOCK"] = min(constants["BLOCK"], triton.next_power_of_2(width))
    programs, per_program = chunks(
        images, count, constants["ROWS"], BACKWARD_WARPS // constants["num_warps"]
    )
    partials = torch.empty(images, programs, width, dtype=torch.float32, device=x.device)
    _td_rms_norm_bwd_kernel[(images * programs,)](
        dy_rows,
        dsum_rows,
        rows,
        scale,
        rms,
        dx,
        y,
        partials,
        count,
        programs,
        per_program,
        (dy_rows.stride(0), dy_rows.stride(1)),
        (dsum_rows.stride(0), dsum_rows.stride(1)),
        (rows.stride(0), rows.stride(1)),
        scale_stride,
        HAS_DSUM=dsum is not None,
        NEEDS_Y=needs_y,
        WIDTH=width,
        **constants,
    )
    return dx, sum_partials(partials, scale.shape[0]), y


@triton.jit
def _td_rms_norm_fwd_kernel(
    x_ptr,  # [B, N, WIDTH]
    residual_ptr,  # [B, N, WIDTH]
    scale_ptr,  # [T, WIDTH]
    bias_ptr,  # [WIDTH]
    sum_ptr,  # [B, N, WIDTH], written
    y_ptr,  # [B, N, WIDTH], contiguous
    rms_ptr,  # [B, N] fp32
    count,  # N
    x_strides,  # (image, row)
    residual_strides,  # (image, row)
    sum_strides,  # (image, row)
    scale_stride,  # 0 if all images share one time
    HAS_RESIDUAL: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(count, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    x_ptr += image * x_strides[0] + row[:, None].to(tl.int64) * x_strides[1]
    residual_ptr += image * residual_strides[0] + row[:, None].to(tl.int64) * residual_strides[1]
    sum_ptr += image * sum_strides[0] + row[:, None].to(tl.int64) * sum_strides[1]
    out = (image * count + row[:, None]) * WIDTH

    x = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row < count)[:, None] & (column < WIDTH)[None, :]
        x = tl.load(x_ptr + column, inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            x += tl.load(residual_ptr + column, inside, other=0.0).to(tl.float32)
        if HAS_SUM:
            total = x
            if HAS_BIAS:
                bias = tl.load(bias_ptr + column, column < WIDTH, other=0.0).to(tl.float32)
                total += bias[None, :]
            tl.store(sum_ptr + column, total.to(sum_ptr.dtype.element_ty), inside)
            x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)
        squares += x * x
    rms = tl.sqrt(tl.sum(squares, 1) / WIDTH)
    tl.store(rms_ptr + image * count + row, rms, row < count)

    r = (1.0 / (rms + 1e-8))[:, None]
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row < count)[:, None] & (column < WIDTH)[None, :]
        if WIDTH > BLOCK:
            x = tl.load(x_ptr + column, inside, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                x += tl.load(residual_ptr + column, inside, other=0.0).to(tl.float32)
                x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)
        scale = tl.load(scale_ptr + image * scale_stride + column, column < WIDTH, other=0.0)
        y = x * r * scale.to(tl.float32)[None, :]
        tl.store(y_ptr + out + column, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _td_rms_norm_fp8_kernel(
    x_ptr,  # [B, N, WIDTH]
    residual_ptr,  # [B, N, WIDTH]
    scale_ptr,  # [T, WIDTH]
    sum_ptr,  # [B, N, WIDTH], contiguous
    values_ptr,  # [B, N, WIDTH] e4m3, contiguous
    scales_ptr,  # [B, N] fp32
    count,  # N
    x_strides,  # (image, row)
    residual_strides,  # (image, row)
    scale_stride,  # 0 if all images share one time
    HAS_RESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # a whole row
):
    blocks = tl.cdiv(count, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)
    first = image * count  # row of the outputs
    x = load_sum(
        x_ptr + image * x_strides[0],
        residual_ptr + image * residual_strides[0],
        sum_ptr + first * WIDTH,
        row,
        column,
        count,
        (x_strides[1], residual_strides[1]),
        HAS_RESIDUAL,
        WIDTH,
    )
    rms = tl.sqrt(tl.sum(x * x, 1) / WIDTH)[:, None]
    scale = tl.load(scale_ptr + image * scale_stride + column, column < WIDTH, other=0.0)
    y = x * (1.0 / (rms + 1e-8)) * scale.to(tl.float32)[None, :]
    store_fp8(values_ptr + first * WIDTH, scales_ptr + first, y, row, column, count, WIDTH)


@triton.jit
def _td_rms_norm_bwd_kernel(
    dy_ptr,  # [B, N, WIDTH]
    dsum_ptr,  # [B, N, WIDTH]
    x_ptr,  # [B, N, WIDTH]
    scale_ptr,  # [T, WIDTH]
    rms_ptr,  # [B, N] fp32
    dx_ptr,  # [B, N, WIDTH], contiguous
    y_ptr,  # [B, N, WIDTH], contiguous
    partials_ptr,  # [B, programs, WIDTH] fp32
    count,  # N
    programs,
    per_program,
    dy_strides,  # (image, row)
    dsum_strides,  # (image, row)
    x_strides,  # (image, row)
    scale_stride,  # 0 if all images share one time
    HAS_DSUM: tl.constexpr,
    NEEDS_Y: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = (tl.program_id(0) // programs).to(tl.int64)
    first = tl.program_id(0) % programs * per_program
    dy_ptr += image * dy_strides[0]
    dsum_ptr += image * dsum_strides[0]
    x_ptr += image * x_strides[0]
    scale_ptr += image * scale_stride
    partials_ptr += tl.program_id(0).to(tl.int64) * WIDTH

    dscale = tl.zeros([ROWS, BLOCK], tl.float32)
    for start_row in range(first, tl.minimum(first + per_program, count), ROWS):
        row = start_row + tl.arange(0, ROWS)
        wide_row = row[:, None].to(tl.int64)
        rms = tl.load(rms_ptr + image * count + row, row < count, other=1.0)
        r = 1.0 / (rms + 1e-8)
        x = tl.zeros([ROWS, BLOCK], tl.float32)
        dy = tl.zeros([ROWS, BLOCK], tl.float32)
        scale = tl.zeros([BLOCK], tl.float32)
        dots = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = (row < count)[:, None] & (column < WIDTH)[None, :]
            x = tl.load(x_ptr + wide_row * x_strides[1] + column, inside, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + wide_row * dy_strides[1] + column, inside, other=0.0)
            dy = dy.to(tl.float32)
            scale = tl.load(scale_ptr + column, column < WIDTH, other=0.0).to(tl.float32)
            dots += dy * scale[None, :] * x
        # On a row of zeros the rms has no gradient: the second term is zero.
        pull = tl.sum(dots, 1) / WIDTH * r * r / tl.where(rms > 0, rms, 1.0)
        for start in range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = (row < count)[:, None] & (column < WIDTH)[None, :]
            if WIDTH > BLOCK:
                x = tl.load(x_ptr + wide_row * x_strides[1] + column, inside, other=0.0)
                x = x.to(tl.float32)
                dy = tl.load(dy_ptr + wide_row * dy_strides[1] + column, inside, other=0.0)
                dy = dy.to(tl.float32)
                scale = tl.load(scale_ptr + column, column < WIDTH, other=0.0).to(tl.float32)
            dx = dy * scale[None, :] * r[:, None] - x * pull[:, None]
            if HAS_DSUM:
                dsum = tl.load(dsum_ptr + wide_row * dsum_strides[1] + column, inside, other=0.0)
                dx += dsum.to(tl.float32)
            out = (image * count + wide_row) * WIDTH + column
            tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), inside)
            if NEEDS_Y:
                y = x * r[:, None] * scale[None, :]
                tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), inside)
            if WIDTH > BLOCK:
                # Too wide for registers: the program keeps its partial sums in memory.
                part = tl.sum(dy * x * r[:, None], 0)
                if start_row > first:
                    part += tl.load(partials_ptr + column, column < WIDTH, other=0.0)
                tl.store(partials_ptr + column, part, column < WIDTH)
            else:
                dscale += dy * x * r[:, None]
    if WIDTH <= BLOCK:
        column = tl.arange(0, BLOCK)
        tl.store(partials_ptr + column, tl.sum(dscale, 0), column < WIDTH)
