"""Code that the norms' kernels share: features as rows of images, sums of partial gradients."""

import torch
import triton
import triton.language as tl

from dimr_fast.kernels.configuration import configuration

PROGRAMS = 512
"""The most programs that a backward pass is split into: about four per multiprocessor."""


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Return `[B, …, D]` as `[B, N, D]` with a contiguous last axis: a view if strides allow it."""
    rows = x[:, None] if x.dim() == 2 else x.flatten(1, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def as_written_rows(out: torch.Tensor) -> torch.Tensor:
    """Return a view `[B, N, D]` of `out` `[B, …, D]` to write to.

    Raises ValueError if the last axis is not contiguous.
    """
    if out.stride(-1) != 1:
        raise ValueError(f"out: got strides {out.stride()}, expected adjacent columns")
    return out[:, None] if out.dim() == 2 else out.view(out.shape[0], -1, out.shape[-1])


def as_values(value: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return a `[T, D]` value with a contiguous last axis, and its stride from image to image.

    The stride is 0 if all images share one time. The values of a model are views of one buffer
    (`td_parameters`), so their rows are not adjacent; copying them would cost a launch per norm.
    """
    value = value if value.stride(-1) == 1 else value.contiguous()
    return value, 0 if value.shape[0] == 1 else value.stride(0)


def chunks(images: int, rows: int, rows_at_once: int, programs: int = PROGRAMS) -> tuple[int, int]:
    """Split an image's rows among programs of a backward pass; return programs and rows of each.

    All images together get at most about `programs` programs.
    """
    programs = max(1, min(triton.cdiv(rows, rows_at_once), triton.cdiv(programs, images)))
    per_program = triton.cdiv(triton.cdiv(rows, programs), rows_at_once) * rows_at_once
    return triton.cdiv(rows, per_program), per_program


def sum_partials(partials: torch.Tensor, times: int) -> torch.Tensor:
    """Sum partial sums `[B, C, D]` to `[T, D]`: over C and, if T is 1, over B."""
    images, chunks, width = partials.shape
    count = images * chunks // times
    if count == 1:
        return partials.reshape(times, width)
    total = torch.empty(times, width, dtype=torch.float32, device=partials.device)
    constants = configuration("sum_partials", width, partials.device)
    grid = (times * triton.cdiv(width, constants["BLOCK"]),)
    _sum_partials_kernel[grid](partials, total, count, width, **constants)
    return total


@triton.jit
def load_sum(
    x_ptr,
    residual_ptr,
    sum_ptr,
    row,
    column,
    count,
    strides,
    HAS_RESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return whole rows of an image in fp32, zero outside: x or, stored too, x + residual.

    `strides` are those of the rows of x and residual; the sum is contiguous. The result is the sum
    as stored.
    """
    inside = (row < count) & (column < WIDTH)[None, :]
    wide_row = row.to(tl.int64)
    x = tl.load(x_ptr + wide_row * strides[0] + column, inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + wide_row * strides[1] + column, inside, other=0.0)
        x += residual.to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + wide_row * WIDTH + column, rounded, inside)
        x = rounded.to(tl.float32)
    return x


@triton.jit
def _sum_partials_kernel(
    partials_ptr,  # [T, count, width] fp32
    total_ptr,  # [T, width] fp32
    count,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    time = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    # Many rows at once, so that their loads overlap.
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < count) & (column < width)[None, :]
        total += tl.load(partials_ptr + (time * count + row) * width + column, inside, other=0.0)
    tl.store(total_ptr + time * width + column, tl.sum(total, 0), column < width)
