"""Tiles of a head: what the kernels of `attention` load, multiply and store.

A tile here is a tuple of tensors `[R, widths[i]]`, side by side: a head as wide as `tile_widths`
says, since a tensor's own shape must be powers of two.
"""

import triton
import triton.language as tl


def tile_widths(head_dim: int) -> tuple[int, ...]:
    """Powers of two that cover a head with the least waste; the tensor cores take 16 at least."""
    whole = max(16, triton.next_power_of_2(head_dim))
    split = (whole // 2, max(16, triton.next_power_of_2(head_dim - whole // 2)))
    return split if whole > 16 and sum(split) < whole else (whole,)


@triton.jit
def load(
    ptr,
    token,
    stride,
    count,
    WHOLE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """The tokens' rows of one head `[R, HEAD_DIM]` as tiles of those widths, zero beyond."""
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        column = i * WIDTHS[0] + tl.arange(0, WIDTHS[i])
        inside = (column < HEAD_DIM)[None, :]
        if not WHOLE:
            inside = inside & (token < count)[:, None]
        at = ptr + token[:, None].to(tl.int64) * stride + column[None, :]
        tiles += (tl.load(at, inside, other=0.0),)
    return tiles


@triton.jit
def store(ptr, token, stride, count, tiles, HEAD_DIM: tl.constexpr, FACTOR: tl.constexpr = 1.0):
    for i in tl.static_range(len(tiles)):
        column = i * tiles[0].shape[1] + tl.arange(0, tiles[i].shape[1])
        inside = (column < HEAD_DIM)[None, :] & (token < count)[:, None]
        at = ptr + token[:, None].to(tl.int64) * stride + column[None, :]
        tl.store(at, (tiles[i] * FACTOR).to(ptr.dtype.element_ty), inside)


@triton.jit
def zeros(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        tiles += (_zeros_tile(ROWS, WIDTHS[i]),)
    return tiles


@triton.jit
def scaled(tiles, factors):
    """Rows `[R, D]`, or one row for all, times factors `[R]`, in fp32."""
    products = ()
    for i in tl.static_range(len(tiles)):
        products += (tiles[i].to(tl.float32) * factors[:, None],)
    return products


@triton.jit
def row_dots(a, b):
    """Each row of `a` `[R, D]` times that of `b`, or times its only row: `[R]` in fp32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total


@triton.jit
def _zeros_tile(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    # Of its own, since Triton 3.6 takes no element of a tuple in a shape.
    return tl.zeros([ROWS, WIDTH], tl.float32)


@triton.jit
def plus_row(row, weights, tiles):
    """`row` `[1, D]` + Σ weights `[R]` · rows of `tiles` `[R, D]`, in fp32."""
    total = ()
    for i in tl.static_range(len(tiles)):
        weighted = tiles[i].to(tl.float32) * weights[:, None]
        total += (row[i] + tl.sum(weighted, 0)[None, :],)
    return total


@triton.jit
def plus_rows(acc, factors, tiles):
    """`acc` `[R, D]` + factors `[R]` · rows of `tiles` `[R, D]`, in fp32."""
    total = ()
    for i in tl.static_range(len(tiles)):
        total += (acc[i] + tiles[i].to(tl.float32) * factors[:, None],)
    return total


@triton.jit
def dots(a, b, WIDEN: tl.constexpr):
    """`a·bᵀ` `[R, S]` of `a` `[R, D]` and `b` `[S, D]`."""
    total = _dot(a[0], tl.trans(b[0]), None, WIDEN)
    for i in tl.static_range(1, len(a)):
        total = _dot(a[i], tl.trans(b[i]), total, WIDEN)
    return total


@triton.jit
def plus_product(acc, weights, tiles, WIDEN: tl.constexpr):
    """`acc + weights·tiles` `[R, D]` of weights `[R, S]` and tiles `[S, D]`."""
    total = ()
    for i in tl.static_range(len(tiles)):
        total += (_dot(weights, tiles[i], acc[i], WIDEN),)
    return total


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr):
    if WIDEN:
        # The interpreter would multiply bf16's bit patterns.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
