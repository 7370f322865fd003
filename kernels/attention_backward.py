"""The backward kernels of `attention`: one computes dq, one dk and dv."""

import triton
import triton.language as tl

from dimr_fast.kernels.attention_tiles import (
    FIRST_ROWS,
    LOG2E,
    dots,
    load,
    load_row,
    load_statistics,
    place,
    plus_product,
    plus_rows,
    row_dots,
    store,
    store_row,
    zeros,
)


@triton.jit
def attention_bwd_dq_kernel(
    qkv_ptr,  # [B, N, 3, HEADS, HEAD_DIM]
    image_stride,  # of qkv, in units
    count,  # N
    out_ptr,  # [B, N, HEADS, HEAD_DIM], contiguous
    parts_ptr,  # [B, HEADS, 2, N] fp32: top and share
    dout_ptr,  # [B, N, HEADS, HEAD_DIM], contiguous
    statistics_ptr,  # [B, HEADS, N, 4] fp32, written: top, share, delta and one unused
    dqkv_ptr,  # [B, N, 3, HEADS, HEAD_DIM], contiguous
    STRIDE: tl.constexpr,  # of qkv, from token to token
    UNIT: tl.constexpr,
    FIRST: tl.constexpr,
    WHOLE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTHS: tl.constexpr,
    FIRST_WIDTHS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    image, head, block = place(count, FIRST, BLOCK_M, HEADS)
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    q_ptr = qkv_ptr + image * image_stride * UNIT + head * HEAD_DIM
    out_ptr += image * count * WIDTH + head * HEAD_DIM
    dout_ptr += image * count * WIDTH + head * HEAD_DIM
    dq_ptr = dqkv_ptr + image * count * 3 * WIDTH + head * HEAD_DIM
    top_ptr = parts_ptr + (image * HEADS + head) * 2 * count
    statistics_ptr += (image * HEADS + head) * count * 4
    if block < 0:
        if FIRST:
            _dq_tile(
                q_ptr,
                0,
                1,
                FIRST_ROWS,
                out_ptr,
                dout_ptr,
                top_ptr,
                statistics_ptr,
                dq_ptr,
                count,
                STRIDE,
                WIDTH,
                FIRST,
                WHOLE,
                HEAD_DIM,
                FIRST_WIDTHS,
                BLOCK_N,
            )
    else:
        _dq_tile(
            q_ptr,
            FIRST + block * BLOCK_M,
            count,
            BLOCK_M,
            out_ptr,
            dout_ptr,
            top_ptr,
            statistics_ptr,
            dq_ptr,
            count,
            STRIDE,
            WIDTH,
            FIRST,
            WHOLE,
            HEAD_DIM,
            WIDTHS,
            BLOCK_N,
        )


@triton.jit
def _dq_tile(
    q_ptr,
    start,
    end,
    BLOCK_M: tl.constexpr,
    out_ptr,
    dout_ptr,
    top_ptr,
    statistics_ptr,
    dq_ptr,
    count,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    WHOLE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute dq and the statistics of a tile of queries from `start` (those before `end`)."""
    # Exactly computed, a row of ds sums to zero. The rounding of `out` leaves a remainder, which
    # fp32 shows: if all tokens are equal, dq consists of nothing else. So in fp32 the remainder is
    # subtracted from ds, by adding it to delta and correcting dq.
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    k_ptr = q_ptr + WIDTH
    v_ptr = k_ptr + WIDTH
    q = load(q_ptr, start, end, BLOCK_M, False, STRIDE, HEAD_DIM, WIDTHS)
    dout = load(dout_ptr, start, end, BLOCK_M, False, WIDTH, HEAD_DIM, WIDTHS)
    out = load(out_ptr, start, end, BLOCK_M, False, WIDTH, HEAD_DIM, WIDTHS)
    delta = row_dots(dout, out)
    top = load_row(top_ptr, start, end, BLOCK_M)
    share = load_row(top_ptr + count, start, end, BLOCK_M)
    dq = zeros(BLOCK_M, WIDTHS)
    left, mean = tl.zeros([BLOCK_M], tl.float32), zeros(BLOCK_M, WIDTHS)
    if FIRST:
        dq, left, mean = _dq_keys(
            q,
            dout,
            top,
            share,
            delta,
            dq,
            left,
            mean,
            k_ptr,
            v_ptr,
            0,
            1,
            FIRST_ROWS,
            False,
            EXACT,
            STRIDE,
            HEAD_DIM,
            WIDTHS,
        )
    for key in range(FIRST, count, BLOCK_N):
        dq, left, mean = _dq_keys(
            q,
            dout,
            top,
            share,
            delta,
            dq,
            left,
            mean,
            k_ptr,
            v_ptr,
            key,
            count,
            BLOCK_N,
            WHOLE,
            EXACT,
            STRIDE,
            HEAD_DIM,
            WIDTHS,
        )
    if EXACT:
        delta += left
        dq = plus_rows(dq, -left, mean)
    store_row(statistics_ptr, start, end, top, 4)
    store_row(statistics_ptr + 1, start, end, share, 4)
    store_row(statistics_ptr + 2, start, end, delta, 4)
    store(dq_ptr, start, end, 3 * WIDTH, dq, HEAD_DIM, HEAD_DIM**-0.5)


@triton.jit
def _dq_keys(
    q,
    dout,
    top,
    share,
    delta,
    dq,
    left,
    mean,
    k_ptr,
    v_ptr,
    start,
    end,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
    EXACT: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """Add the contribution of a tile of keys to dq and, if EXACT, to `left` and `mean`."""
    scale: tl.constexpr = HEAD_DIM**-0.5 * LOG2E
    k = load(k_ptr, start, end, BLOCK_N, WHOLE, STRIDE, HEAD_DIM, WIDTHS)
    v = load(v_ptr, start, end, BLOCK_N, WHOLE, STRIDE, HEAD_DIM, WIDTHS)
    s = dots(q, k)
    if not WHOLE:
        s = tl.where((start + tl.arange(0, BLOCK_N) < end)[None, :], s, float("-inf"))
    p = tl.exp2(s * scale - top[:, None]) * share[:, None]
    ds = p * (dots(dout, v) - delta[:, None])
    dq = plus_product(dq, ds.to(k[0].dtype), k)
    if EXACT:
        left += tl.sum(ds, 1)
        mean = plus_product(mean, p, k)
    return dq, left, mean


@triton.jit
def attention_bwd_dkdv_kernel(
    qkv_ptr,  # [B, N, 3, HEADS, HEAD_DIM]
    image_stride,  # of qkv, in units
    count,  # N
    dout_ptr,  # [B, N, HEADS, HEAD_DIM], contiguous
    statistics_ptr,  # [B, HEADS, N, 4] fp32: top, share, delta and one unused
    dqkv_ptr,  # [B, N, 3, HEADS, HEAD_DIM], contiguous
    STRIDE: tl.constexpr,  # of qkv, from token to token
    UNIT: tl.constexpr,
    FIRST: tl.constexpr,
    WHOLE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTHS: tl.constexpr,
    FIRST_WIDTHS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    image, head, block = place(count, FIRST, BLOCK_N, HEADS)
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    q_ptr = qkv_ptr + image * image_stride * UNIT + head * HEAD_DIM
    dout_ptr += image * count * WIDTH + head * HEAD_DIM
    dq_ptr = dqkv_ptr + image * count * 3 * WIDTH + head * HEAD_DIM
    statistics_ptr += (image * HEADS + head) * count * 4
    if block < 0:
        if FIRST:
            _dkdv_tile(
                q_ptr,
                0,
                1,
                FIRST_ROWS,
                dout_ptr,
                statistics_ptr,
                dq_ptr,
                count,
                STRIDE,
                WIDTH,
                FIRST,
                WHOLE,
                HEAD_DIM,
                FIRST_WIDTHS,
                BLOCK_M,
            )
    else:
        _dkdv_tile(
            q_ptr,
            FIRST + block * BLOCK_N,
            count,
            BLOCK_N,
            dout_ptr,
            statistics_ptr,
            dq_ptr,
            count,
            STRIDE,
            WIDTH,
            FIRST,
            WHOLE,
            HEAD_DIM,
            WIDTHS,
            BLOCK_M,
        )


@triton.jit
def _dkdv_tile(
    q_ptr,
    start,
    end,
    BLOCK_N: tl.constexpr,
    dout_ptr,
    statistics_ptr,
    dq_ptr,
    count,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    WHOLE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Compute dk and dv of a tile of keys from `start` (those before `end`) from all queries."""
    k = load(q_ptr + WIDTH, start, end, BLOCK_N, False, STRIDE, HEAD_DIM, WIDTHS)
    v = load(q_ptr + 2 * WIDTH, start, end, BLOCK_N, False, STRIDE, HEAD_DIM, WIDTHS)
    dk = zeros(BLOCK_N, WIDTHS)
    dv = zeros(BLOCK_N, WIDTHS)
    if FIRST:
        dk, dv = _dkdv_queries(
            k,
            v,
            dk,
            dv,
            q_ptr,
            dout_ptr,
            statistics_ptr,
            0,
            1,
            FIRST_ROWS,
            False,
            STRIDE,
            WIDTH,
            HEAD_DIM,
            WIDTHS,
        )
    for query in range(FIRST, count, BLOCK_M):
        dk, dv = _dkdv_queries(
            k,
            v,
            dk,
            dv,
            q_ptr,
            dout_ptr,
            statistics_ptr,
            query,
            count,
            BLOCK_M,
            WHOLE,
            STRIDE,
            WIDTH,
            HEAD_DIM,
            WIDTHS,
        )
    store(dq_ptr + WIDTH, start, end, 3 * WIDTH, dk, HEAD_DIM, HEAD_DIM**-0.5)
    store(dq_ptr + 2 * WIDTH, start, end, 3 * WIDTH, dv, HEAD_DIM)


@triton.jit
def _dkdv_queries(
    k,
    v,
    dk,
    dv,
    q_ptr,
    dout_ptr,
    statistics_ptr,
    start,
    end,
    BLOCK_M: tl.constexpr,
    WHOLE: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """Add the contribution of a tile of queries to dk and dv."""
    scale: tl.constexpr = HEAD_DIM**-0.5 * LOG2E
    q = load(q_ptr, start, end, BLOCK_M, WHOLE, STRIDE, HEAD_DIM, WIDTHS)
    dout = load(dout_ptr, start, end, BLOCK_M, WHOLE, WIDTH, HEAD_DIM, WIDTHS)
    # A query past the last has a share of zero, so its weights are zero.
    top, share, delta = load_statistics(statistics_ptr, start, end, BLOCK_M, WHOLE)
    p = tl.exp2(dots(k, q) * scale - top[None, :]) * share[None, :]
    dv = plus_product(dv, p.to(dout[0].dtype), dout)
    ds = p * (dots(v, dout) - delta[None, :])
    dk = plus_product(dk, ds.to(q[0].dtype), q)
    return dk, dv
