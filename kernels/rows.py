"""What the norms' kernels share: features as rows of images, and the sum of partial gradients."""

import torch
import triton
import triton.language as tl

from dimr_fast.kernels.configuration import configuration

PROGRAMS = 512
"""Programs at which a backward pass splits rows no further: about four a multiprocessor."""


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`[B, …, D]` as `[B, N, D]` with adjacent columns: a view where the strides allow it."""
    rows = x[:, None] if x.dim() == 2 else x.flatten(1, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def as_written_rows(out: torch.Tensor) -> torch.Tensor:
    """`[B, …, D]` to write to as `[B, N, D]`: a view, or ValueError where there is none."""
    if out.stride(-1) != 1:
        raise ValueError(f"out: got strides {out.stride()}, expected adjacent columns")
    return out[:, None] if out.dim() == 2 else out.view(out.shape[0], -1, out.shape[-1])


def as_values(value: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A `[T, D]` value with adjacent columns, and the stride from one image's to the next's.

    The stride is 0 where all images share one time. Values are views of one buffer of a model's
    (`td_parameters`), whose rows are not adjacent: copying each would cost a launch a norm.
    """
    value = value if value.stride(-1) == 1 else value.contiguous()
    return value, 0 if value.shape[0] == 1 else value.stride(0)


def chunks(images: int, rows: int, rows_at_once: int, programs: int = PROGRAMS) -> tuple[int, int]:
    """How to share an image's rows among programs of a backward pass: programs, rows of each.

    All images together are split no further than into so many `programs`.
    """
    programs = max(1, min(triton.cdiv(rows, rows_at_once), triton.cdiv(programs, images)))
    per_program = triton.cdiv(triton.cdiv(rows, programs), rows_at_once) * rows_at_once
    return triton.cdiv(rows, per_program), per_program


def sum_partials(partials: torch.Tensor, times: int) -> torch.Tensor:
    """`[B, C, D]` partial sums to `[T, D]`: over C, and over B where T is 1."""
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
    # Many rows at once: one after another, each would wait for the load of its own.
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < count) & (column < width)[None, :]
        total += tl.load(partials_ptr + (time * count + row) * width + column, inside, other=0.0)
    tl.store(total_ptr + time * width + column, tl.sum(total, 0), column < width)
