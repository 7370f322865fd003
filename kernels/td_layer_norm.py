"""Layer norm with a time-dependent scale and shift, over rows that may consist of pieces.

    s = x + residual      n = (s − mean(s)) · rstd      rstd = 1 / sqrt(var(s) + 1e-5)
    y = n · weight + bias

and backward, with g = dy · weight and the gradient ds of the sum s:

    dx = rstd · (g − mean(g) − n · mean(g·n)) + ds    dweight = Σ_rows dy · n    dbias = Σ_rows dy

A row is one piece, or the concatenation of several pieces of the same width, each with its own
strides: the features of the cascade are normed in place, without concatenating them.

Forward moves x, residual, sum and y once; a row too wide for registers is read a second time, from
the L2 cache. Backward moves x, dy, ds and dx once. Rows wider than a block take two kernels: one
reads x and dy for the two means of each row; the other reads them again and writes dx and, if
needed, y. A program of the second one keeps the same columns for all its rows, so that weight, bias
and their gradients stay in registers. norms.md gives the reasons.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from dimr_fast.kernels.configuration import configuration
from dimr_fast.kernels.fp8 import empty_fp8, store_fp8
from dimr_fast.kernels.rows import as_rows, as_values, chunks, load_sum, sum_partials
from dimr_fast.kernels.td_layer_norm_pieces import (
    affine,
    pieces_bwd_means_kernel,
    pieces_fwd_kernel,
    select_piece,
    statistics,
)


def launch_fwd(
    weight: torch.Tensor,
    bias: torch.Tensor,
    pieces: Sequence[torch.Tensor],
    residual: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sum (empty without residual), y `[B, …, P·D]` in `dtype`, mean and rstd `[B, N]`.

    `pieces` are P tensors `[B, …, D]`; with a residual there is one piece.
    """
    x = pieces[0]
    y = torch.empty(*x.shape[:-1], len(pieces) * x.shape[-1], dtype=dtype, device=x.device)
    summed = y.new_empty(0)
    if residual is not None:
        summed = y.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    rows = [as_rows(piece) for piece in pieces]
    images, count, width = rows[0].shape
    mean = torch.empty(images, count, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return summed, y, mean, rstd
    weight, weight_stride = as_values(weight)
    bias, bias_stride = as_values(bias)
    if len(rows) > 1:
        constants = dict(configuration("td_layer_norm_pieces_fwd", width, x.device))
        constants["BLOCK"] = min(constants["BLOCK"], triton.next_power_of_2(len(rows) * width))
        pieces_fwd_kernel[(images * triton.cdiv(count, constants["ROWS"]),)](
            tuple(rows),
            weight,
            bias,
            y,
            mean,
            rstd,
            count,
            *_piece_strides(rows),
            (weight_stride, bias_stride),
            ALIGNED=all(_aligned(piece) for piece in rows),
            PIECES=len(rows),
            WIDTH=width,
            **constants,
        )
        return summed, y, mean, rstd
    added = rows[0] if residual is None else as_rows(residual)
    constants = dict(configuration("td_layer_norm_fwd", width, x.device))
    constants["BLOCK"] = min(constants["BLOCK"], triton.next_power_of_2(width))
    _td_layer_norm_fwd_kernel[(images * triton.cdiv(count, constants["ROWS"]),)](
        rows[0],
        added,
        weight,
        bias,
        summed,
        y,
        mean,
        rstd,
        count,
        (rows[0].stride(0), rows[0].stride(1)),
        (added.stride(0), added.stride(1)),
        (weight_stride, bias_stride),
        HAS_RESIDUAL=residual is not None,
        WIDTH=width,
        **constants,
    )
    return summed, y, mean, rstd


def launch_fp8(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sum (empty without residual), and the values and scales of its norm in FP8."""
    values, scales = empty_fp8(x, x.shape[-1])
    summed = x.new_empty(0)
    if residual is not None:
        summed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    if x.numel() == 0:
        return summed, values, scales
    rows = as_rows(x)
    weight, weight_stride = as_values(weight)
    bias, bias_stride = as_values(bias)
    images, count, width = rows.shape
    added = rows if residual is None else as_rows(residual)
    constants = configuration("td_layer_norm_fp8", width, x.device)
    _td_layer_norm_fp8_kernel[(images * triton.cdiv(count, constants["ROWS"]),)](
        rows,
        added,
        weight,
        bias,
        summed,
        values,
        scales,
        count,
        (rows.stride(0), rows.stride(1)),
        (added.stride(0), added.stride(1)),
        (weight_stride, bias_stride),
        HAS_RESIDUAL=residual is not None,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        **constants,
    )
    return summed, values, scales


def launch_bwd(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    pieces: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs_dx: bool,
    needs_y: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of pieces `[P, B, …, D]` and of weight and bias `[2, T, P·D]`, and y.

    If forward had a residual, `pieces` contains the sum that was normed, and `dx` is its gradient.
    y is computed again, in the dtype of `dy`. Results that are not needed are empty.
    """
    x = pieces[0]
    dx = torch.empty((len(pieces), *x.shape) if needs_dx else (0,), dtype=x.dtype, device=x.device)
    y = torch.empty(dy.shape if needs_y else (0,), dtype=dy.dtype, device=x.device)
    rows = [as_rows(piece) for piece in pieces]
    images, count, width = rows[0].shape
    times = max(weight.shape[0], bias.shape[0])
    if x.numel() == 0:
        return dx, torch.zeros(2, times, weight.shape[1], dtype=torch.float32, device=x.device), y
    dy_rows = as_rows(dy)
    dsum_rows = dy_rows if dsum is None else as_rows(dsum)
    weight, weight_stride = as_values(weight)
    bias, bias_stride = as_values(bias)

    constants = dict(configuration("td_layer_norm_bwd", width * len(rows), x.device))
    constants["BLOCK"] = min(constants["BLOCK"], triton.next_power_of_2(width))
    whole_rows = len(rows) == 1 and width <= constants["BLOCK"]
    means = torch.empty(0, dtype=torch.float32, device=x.device)
    if needs_dx and not whole_rows:
        means = torch.empty(2, images, count, dtype=torch.float32, device=x.device)
        by_rows = dict(configuration("td_layer_norm_bwd_means", width * len(rows), x.device))
        by_rows["BLOCK"] = min(by_rows["BLOCK"], triton.next_power_of_2(width))
        pieces_bwd_means_kernel[(images * triton.cdiv(count, by_rows["ROWS"]),)](
            dy_rows,
            tuple(rows),
            weight,
            mean,
            rstd,
            means,
            images,
            count,
            len(rows),
            (dy_rows.stride(0), dy_rows.stride(1)),
            *_piece_strides(rows),
            weight_stride,
            PIECES=len(rows),
            WIDTH=width,
            **by_rows,
        )
    blocks = len(rows) * triton.cdiv(width, constants["BLOCK"])
    programs, per_program = chunks(images * blocks, count, constants["ROWS"])
    partials = torch.empty(
        2 * images, programs, width * len(rows), dtype=torch.float32, device=x.device
    )
    _td_layer_norm_bwd_kernel[(images * programs * blocks,)](
        dy_rows,
        dsum_rows,
        tuple(rows),
        weight,
        bias,
        mean,
        rstd,
        means,
        dx,
        y,
        partials,
        images,
        count,
        programs,
        per_program,
        (dy_rows.stride(0), dy_rows.stride(1)),
        (dsum_rows.stride(0), dsum_rows.stride(1)),
        *_piece_strides(rows),
        (weight_stride, bias_stride),
        HAS_DSUM=dsum is not None,
        NEEDS_DX=needs_dx,
        NEEDS_Y=needs_y,
        WHOLE_ROWS=whole_rows,
        PIECES=len(rows),
        WIDTH=width,
        **constants,
    )
    return dx, sum_partials(partials, 2 * times).unflatten(0, (2, times)), y


def _piece_strides(pieces: Sequence[torch.Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the strides of each piece from image to image, and from row to row."""
    return tuple(p.stride(0) for p in pieces), tuple(p.stride(1) for p in pieces)


def _aligned(piece: torch.Tensor) -> bool:
    """Return True if every row begins and ends at a multiple of 16 bytes."""
    sizes = (size * piece.element_size() for size in (*piece.stride()[:2], piece.shape[2]))
    return all(value % 16 == 0 for value in (piece.data_ptr(), *sizes))


@triton.jit
def _td_layer_norm_fwd_kernel(
    x_ptr,  # [B, N, WIDTH]
    residual_ptr,  # [B, N, WIDTH]
    weight_ptr,  # [T, WIDTH]
    bias_ptr,  # [T, WIDTH]
    sum_ptr,  # [B, N, WIDTH], contiguous
    y_ptr,  # [B, N, WIDTH], contiguous
    mean_ptr,  # [B, N] fp32
    rstd_ptr,  # [B, N] fp32
    count,  # N
    x_strides,  # (image, row)
    residual_strides,  # (image, row)
    time_strides,  # of weight and bias; 0 if all images share one time
    HAS_RESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(count, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, BLOCK)
    x_ptr += image * x_strides[0] + row.to(tl.int64) * x_strides[1]
    residual_ptr += image * residual_strides[0] + row.to(tl.int64) * residual_strides[1]
    statistic = image * count + row
    out = statistic * WIDTH

    x = tl.zeros([ROWS, BLOCK], tl.float32)
    lane_mean = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + lane
        inside = (row < count) & (column < WIDTH)[None, :]
        x = tl.load(x_ptr + column, inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            x += tl.load(residual_ptr + column, inside, other=0.0).to(tl.float32)
            rounded = x.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + out + column, rounded, inside)
            x = rounded.to(tl.float32)
        step = tl.where(inside, x - lane_mean, 0.0)
        lane_mean += step * (1.0 / (start // BLOCK + 1))
        squares += step * (x - lane_mean)
    seen = (WIDTH // BLOCK + (lane < WIDTH % BLOCK)).to(tl.float32)[None, :]
    mean, rstd = statistics(lane_mean, squares, seen, WIDTH)
    tl.store(mean_ptr + statistic, mean, row < count)
    tl.store(rstd_ptr + statistic, rstd, row < count)

    weight_ptr += image * time_strides[0]
    bias_ptr += image * time_strides[1]
    for start in range(0, WIDTH, BLOCK):
        column = start + lane
        inside = (row < count) & (column < WIDTH)[None, :]
        if WIDTH > BLOCK:
            x = tl.load(x_ptr + column, inside, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                x += tl.load(residual_ptr + column, inside, other=0.0).to(tl.float32)
                x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)
        normed = (x - mean) * rstd
        y = affine(normed, weight_ptr + column, bias_ptr + column, column < WIDTH)
        tl.store(y_ptr + out + column, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _td_layer_norm_fp8_kernel(
    x_ptr,  # [B, N, WIDTH]
    residual_ptr,  # [B, N, WIDTH]
    weight_ptr,  # [T, WIDTH]
    bias_ptr,  # [T, WIDTH]
    sum_ptr,  # [B, N, WIDTH], contiguous
    values_ptr,  # [B, N, WIDTH] e4m3, contiguous
    scales_ptr,  # [B, N] fp32
    count,  # N
    x_strides,  # (image, row)
    residual_strides,  # (image, row)
    time_strides,  # of weight and bias; 0 if all images share one time
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
    mean = tl.sum(x, 1)[:, None] / WIDTH
    centred = tl.where((column < WIDTH)[None, :], x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1)[:, None] / WIDTH + 1e-5)
    weight_ptr += image * time_strides[0]
    bias_ptr += image * time_strides[1]
    y = affine(centred * rstd, weight_ptr + column, bias_ptr + column, column < WIDTH)
    store_fp8(values_ptr + first * WIDTH, scales_ptr + first, y, row, column, count, WIDTH)


@triton.jit
def _td_layer_norm_bwd_kernel(
    dy_ptr,  # [B, N, PIECES * WIDTH]
    dsum_ptr,  # [B, N, PIECES * WIDTH]
    x_ptrs,  # PIECES of [B, N, WIDTH]
    weight_ptr,  # [T, PIECES * WIDTH]
    bias_ptr,  # [T, PIECES * WIDTH]
    mean_ptr,  # [B, N] fp32
    rstd_ptr,  # [B, N] fp32
    means_ptr,  # [2, B, N] fp32: mean(g) and mean(g·n); unused if WHOLE_ROWS
    dx_ptr,  # [PIECES, B, N, WIDTH], contiguous
    y_ptr,  # [B, N, PIECES * WIDTH], contiguous
    partials_ptr,  # [2, B, programs, PIECES * WIDTH] fp32: gradients of weight and bias
    images,  # B
    count,  # N
    programs,
    per_program,
    dy_strides,  # (image, row)
    dsum_strides,  # (image, row)
    image_strides,  # of each piece
    row_strides,  # of each piece
    time_strides,  # of weight and bias; 0 if all images share one time
    HAS_DSUM: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_Y: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    piece = tl.program_id(0) % (PIECES * BLOCKS) // BLOCKS
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    channel = piece * WIDTH + column
    program = tl.program_id(0) // (PIECES * BLOCKS)
    image = (program // programs).to(tl.int64)
    first = program % programs * per_program

    x_ptr, x_image, x_row = select_piece(x_ptrs, image_strides, row_strides, piece, 0, PIECES)
    x_ptr += image * x_image + column[None, :]
    dy_ptr += image * dy_strides[0] + channel[None, :]
    dsum_ptr += image * dsum_strides[0] + channel[None, :]
    weight = tl.load(weight_ptr + image * time_strides[0] + channel, column < WIDTH, other=0.0)
    weight = weight.to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + image * time_strides[1] + channel, column < WIDTH, other=0.0)
    bias = bias.to(tl.float32)[None, :]

    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, tl.minimum(first + per_program, count), ROWS):
        row = start + tl.arange(0, ROWS)
        wide_row = row[:, None].to(tl.int64)
        inside = (row < count)[:, None] & (column < WIDTH)[None, :]
        statistic = image * count + row
        mean = tl.load(mean_ptr + statistic, row < count, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + statistic, row < count, other=0.0)[:, None]
        x = tl.load(x_ptr + wide_row * x_row, inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + wide_row * dy_strides[1], inside, other=0.0).to(tl.float32)
        normed = tl.where(inside, (x - mean) * rstd, 0.0)
        dweight += dy * normed
        dbias += dy
        if NEEDS_DX:
            g = dy * weight
            if WHOLE_ROWS:
                total = tl.sum(g, 1) / WIDTH
                dot = tl.sum(g * normed, 1) / WIDTH
            else:
                total = tl.load(means_ptr + statistic, row < count, other=0.0)
                dot = tl.load(
                    means_ptr + tl.cast(images, tl.int64) * count + statistic,
                    row < count,
                    other=0.0,
                )
            dx = rstd * (g - total[:, None] - normed * dot[:, None])
            if HAS_DSUM:
                dsum = tl.load(dsum_ptr + wide_row * dsum_strides[1], inside, other=0.0)
                dx += dsum.to(tl.float32)
            out = ((piece.to(tl.int64) * images + image) * count + wide_row) * WIDTH + column
            tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), inside)
        if NEEDS_Y:
            y = (normed * weight + bias).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + statistic[:, None] * (PIECES * WIDTH) + channel[None, :], y, inside)

    partials_ptr += program.to(tl.int64) * (PIECES * WIDTH) + channel
    tl.store(partials_ptr, tl.sum(dweight, 0), column < WIDTH)
    partials_ptr += tl.cast(images, tl.int64) * programs * (PIECES * WIDTH)
    tl.store(partials_ptr, tl.sum(dbias, 0), column < WIDTH)
