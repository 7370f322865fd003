"""Tiles of a head: how the kernels of `attention` load, multiply and store them.

A tile is a tuple of tensors `[R, widths[i]]` that are adjacent columns of a head, because each
tensor's shape must be powers of two. `tile_widths` chooses the widths.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FIRST_ROWS = tl.constexpr(16)
"""The number of rows of the first token's tile: the fewest that the tensor cores take."""

_WIDEN = tl.constexpr(triton.knobs.runtime.interpret)
"""True in Triton's interpreter, which would multiply the bit patterns of bf16 numbers."""


def tile_widths(head_dim: int, most: int = 2) -> tuple[int, ...]:
    """Return one or two (at most `most`) powers of two that cover a head with the least waste.

    Each is at least 16, the least that the tensor cores take.
    """
    whole = max(16, triton.next_power_of_2(head_dim))
    split = (whole // 2, max(16, triton.next_power_of_2(head_dim - whole // 2)))
    return split if most > 1 and whole > 16 and sum(split) < whole else (whole,)


@triton.jit
def load(
    ptr,
    start,
    end,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """Load ROWS tokens from `start` of one head as tiles of the given widths, zero past `end`.

    `WHOLE` states that all of them are before `end`. Offsets within a tile are the same for every
    tile, so a loop only adds the start of the tile to them.
    """
    row = tl.arange(0, ROWS)
    ptr += _start(start, STRIDE)
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        column = i * WIDTHS[0] + tl.arange(0, WIDTHS[i])
        inside = (column < HEAD_DIM)[None, :]
        if not WHOLE:
            inside = inside & (start + row < end)[:, None]
        at = ptr + (_offsets(row.shape[0], STRIDE) + column[None, :])
        tiles += (tl.load(at, inside, other=0.0),)
    return tiles


@triton.jit
def _start(start, STRIDE: tl.constexpr):
    return tl.full([], STRIDE, tl.int64) * start


@triton.jit
def _offsets(ROWS: tl.constexpr, STRIDE: tl.constexpr):
    # They stay in registers for the whole loop: 32 bits unless tokens are far apart.
    if ROWS * STRIDE < 2**31:
        return (tl.arange(0, ROWS) * STRIDE)[:, None]
    else:
        return (tl.arange(0, ROWS).to(tl.int64) * STRIDE)[:, None]


@triton.jit
def store(
    ptr, start, end, STRIDE: tl.constexpr, tiles, HEAD_DIM: tl.constexpr, FACTOR: tl.constexpr = 1.0
):
    """Store `tiles` times FACTOR as the tokens of one head from `start`, those before `end`."""
    ptr += _start(start, STRIDE)
    row = tl.arange(0, tiles[0].shape[0])
    for i in tl.static_range(len(tiles)):
        column = i * tiles[0].shape[1] + tl.arange(0, tiles[i].shape[1])
        inside = (column < HEAD_DIM)[None, :] & (start + row < end)[:, None]
        at = ptr + (_offsets(row.shape[0], STRIDE) + column[None, :])
        tl.store(at, (tiles[i] * FACTOR).to(ptr.dtype.element_ty), inside)


@triton.jit
def load_row(ptr, start, end, ROWS: tl.constexpr):
    """Load one number per token."""
    row = tl.arange(0, ROWS)
    return tl.load(ptr + start + row, start + row < end, other=0.0)


@triton.jit
def load_statistics(ptr, start, end, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """Load the first three of four numbers per token, in one load."""
    row = tl.arange(0, ROWS)
    at = ptr + start * 4 + (row[:, None] * 4 + tl.arange(0, 4)[None, :])
    four = tl.load(at) if WHOLE else tl.load(at, (start + row < end)[:, None], other=0.0)
    even, odd = tl.split(four.reshape(ROWS, 2, 2))
    first, third = tl.split(even)
    second, _ = tl.split(odd)
    return first, second, third


@triton.jit
def store_row(ptr, start, end, values, STRIDE: tl.constexpr = 1):
    """Store one number per token, those before `end`."""
    row = tl.arange(0, values.shape[0])
    tl.store(ptr + (start + row) * STRIDE, values, start + row < end)


@triton.jit
def zeros(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        tiles += (_zeros_tile(ROWS, WIDTHS[i]),)
    return tiles


@triton.jit
def scaled(tiles, factors):
    """Return rows `[R, D]`, or one row for all, times factors `[R]`, in fp32."""
    products = ()
    for i in tl.static_range(len(tiles)):
        products += (tiles[i].to(tl.float32) * factors[:, None],)
    return products


@triton.jit
def row_dots(a, b):
    """Return the dot products `[R]` in fp32 of the rows of `a` `[R, D]` and `b` `[R or 1, D]`."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total


@triton.jit
def _zeros_tile(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    # A function of its own: Triton 3.6 does not accept an element of a tuple in a shape.
    return tl.zeros([ROWS, WIDTH], tl.float32)


@triton.jit
def plus_rows(acc, factors, tiles):
    """Return `acc` `[R, D]` + factors `[R]` · rows of `tiles` `[R, D]`, in fp32."""
    total = ()
    for i in tl.static_range(len(tiles)):
        total += (acc[i] + tiles[i].to(tl.float32) * factors[:, None],)
    return total


@triton.jit
def dots(a, b):
    """Return `a·bᵀ` `[R, S]` of `a` `[R, D]` and `b` `[S, D]`."""
    total = _dot(a[0], tl.trans(b[0]), None)
    for i in tl.static_range(1, len(a)):
        total = _dot(a[i], tl.trans(b[i]), total)
    return total


@triton.jit
def plus_product(acc, weights, tiles):
    """Return `acc + weights·tiles` `[R, D]` of weights `[R, S]` and tiles `[S, D]`."""
    total = ()
    for i in tl.static_range(len(tiles)):
        total += (_dot(weights, tiles[i], acc[i]),)
    return total


@triton.jit
def _dot(a, b, acc):
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def place(count, FIRST: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr):
    """Return this program's image, head and block of tokens, -1 for the first token's own tile.

    The blocks of one head have consecutive program ids, because they read the same keys.
    """
    blocks = tl.cdiv(count - FIRST, BLOCK) + FIRST
    head = tl.program_id(0) // blocks
    return (head // HEADS).to(tl.int64), head % HEADS, tl.program_id(0) % blocks - FIRST
