"""Full softmax attention from a packed projection, forward and backward.

    s = q·kᵀ / √head_dim        p = softmax(s)        out = p·v

and backward, with δ = Σ dout · out over a row, ds = p · (dout·vᵀ − δ) / √head_dim:

    dq = ds·k        dk = dsᵀ·q        dv = pᵀ·dout

Scores never reach memory: a program keeps a tile of queries (for dk and dv, of keys) and walks
over the others, forward with a running softmax. 4·N²·D FLOP an image forward and 10·N²·D backward
by the usual count; backward in fact computes s and dout·vᵀ twice, once for dq and once for dk and
dv, so that each result has one writer and no atomic adds, 14·N²·D.

q, k and v are read where they lie in the packed tensor. A head is one tile as wide as the next
power of two or, where that would waste more, two (72 is 64 + 16). Where one token is left over
from whole tiles (257 is a class token and 4 · 64), that token is computed apart, on the plain
cores: as a key it starts every running sum, as a query it has a program of its own. Whole tiles
then need no mask, and no tile is computed for the sake of one row.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from dimr_fast.kernels.configuration import configuration

_LOG2E = tl.constexpr(1.4426950408889634)


def launch_fwd(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention `[B, N, D]` of packed `[B, N, 3·D]`, and each row's log Σ exp s `[B, heads, N]`."""
    images, count, width = qkv.shape
    out = torch.empty(images, count, width // 3, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(images, heads, count, dtype=torch.float32, device=qkv.device)
    if qkv.numel():
        qkv = _in_units(qkv, _unit(width // 3 // heads))
        _launch("attention_fwd", _attention_fwd_kernel, "BLOCK_M", qkv, heads, out, lse)
    return out, lse


def launch_bwd(
    dout: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, heads: int
) -> torch.Tensor:
    """Gradient `[B, N, 3·D]` of the packed qkv, from what forward was given and returned."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if qkv.numel():
        qkv = _in_units(qkv, _unit(qkv.shape[2] // 3 // heads))
        dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
        shared = (dout, lse, torch.empty_like(lse), dqkv)
        # In this order: the first kernel writes delta, the third of these, the second reads it.
        _launch("attention_bwd_dq", _attention_bwd_dq_kernel, "BLOCK_M", qkv, heads, out, *shared)
        _launch("attention_bwd_dkdv", _attention_bwd_dkdv_kernel, "BLOCK_N", qkv, heads, *shared)
    return dqkv


def tile_widths(head_dim: int) -> tuple[int, ...]:
    """Powers of two that cover a head with the least waste; the tensor cores take 16 at least."""
    whole = max(16, triton.next_power_of_2(head_dim))
    split = (whole // 2, max(16, triton.next_power_of_2(head_dim - whole // 2)))
    return split if whole > 16 and sum(split) < whole else (whole,)


def _launch(
    table: str, kernel: Any, own: str, qkv: torch.Tensor, heads: int, *tensors: torch.Tensor
) -> None:
    """Start a program for each image, head and tile of `own` tokens, or first token apart."""
    images, count, width = qkv.shape
    head_dim = width // 3 // heads
    # fp32 tiles take twice the memory and are multiplied on the plain cores.
    table += "_fp32" if qkv.dtype == torch.float32 else ""
    constants = configuration(table, head_dim, qkv.device)
    step = constants["BLOCK_N" if own == "BLOCK_M" else "BLOCK_M"]
    first, unit = int(count % step == 1), _unit(head_dim)
    kernel[(images * heads * (triton.cdiv(count - first, constants[own]) + first),)](
        qkv,
        (qkv.stride(0) // unit, qkv.stride(1) // unit),
        count,
        *tensors,
        FIRST=first,
        WHOLE=(count - first) % step == 0,
        HEADS=heads,
        HEAD_DIM=head_dim,
        WIDTHS=tile_widths(head_dim),
        UNIT=unit,
        WIDEN=qkv.device.type == "cpu",
        **constants,
    )


def _unit(head_dim: int) -> int:
    """Elements that a head, a multiple of 4, is a whole number of: 16 bytes at most of 16 bits."""
    return 8 if head_dim % 8 == 0 else 4


def _in_units(qkv: torch.Tensor, unit: int) -> torch.Tensor:
    """`qkv`, or a copy where its columns are not adjacent or a stride is not in whole units.

    Kernels are given strides in units: so the compiler knows how many elements it may load at once.
    """
    fits = qkv.stride(2) == 1 and qkv.stride(0) % unit == qkv.stride(1) % unit == 0
    return qkv if fits else qkv.contiguous()


@triton.jit
def _attention_fwd_kernel(
    qkv_ptr,  # [B, N, 3, HEADS, HEAD_DIM]
    strides,  # of qkv, (image, token), in units
    count,  # N
    out_ptr,  # [B, N, HEADS, HEAD_DIM], contiguous
    lse_ptr,  # [B, HEADS, N] fp32
    FIRST: tl.constexpr,
    WHOLE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTHS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    image, head, block = _place(count, FIRST, BLOCK_M, HEADS)
    stride = tl.full([], UNIT, tl.int64) * strides[1]
    out_stride: tl.constexpr = HEADS * HEAD_DIM
    q_ptr = qkv_ptr + image * strides[0] * UNIT + head * HEAD_DIM
    k_ptr = q_ptr + out_stride
    v_ptr = k_ptr + out_stride
    out_ptr += image * count * out_stride + head * HEAD_DIM
    lse_ptr += (image * HEADS + head) * count
    scale: tl.constexpr = HEAD_DIM**-0.5 * _LOG2E

    zero = tl.arange(0, 1)
    if FIRST:
        k0 = _load(k_ptr, zero, stride, count, True, HEAD_DIM, WIDTHS)
        v0 = _load(v_ptr, zero, stride, count, True, HEAD_DIM, WIDTHS)

    if block < 0:
        if FIRST:
            q0 = _load(q_ptr, zero, stride, count, True, HEAD_DIM, WIDTHS)
            top0 = _row_dots(q0, k0) * scale
            total0 = tl.full([1], 1.0, tl.float32)
            acc0 = _scaled(v0, total0)
            for start in range(1, count, BLOCK_N):
                key = start + tl.arange(0, BLOCK_N)
                k = _load(k_ptr, key, stride, count, True, HEAD_DIM, WIDTHS)
                v = _load(v_ptr, key, stride, count, True, HEAD_DIM, WIDTHS)
                s = _row_dots(k, q0) * scale
                higher = tl.maximum(top0, tl.max(s, 0))
                p = tl.exp2(s - higher)
                fade = tl.exp2(top0 - higher)
                total0 = total0 * fade + tl.sum(p, 0)
                acc0 = _plus_row(_scaled(acc0, fade), p, v)
                top0 = higher
            _store(out_ptr, zero, out_stride, count, _scaled(acc0, 1.0 / total0), HEAD_DIM)
            tl.store(lse_ptr + zero, (top0 + tl.log2(total0)) / _LOG2E)
    else:
        query = FIRST + block * BLOCK_M + tl.arange(0, BLOCK_M)
        q = _load(q_ptr, query, stride, count, False, HEAD_DIM, WIDTHS)
        if FIRST:
            top = _row_dots(q, k0) * scale
            total = tl.full([BLOCK_M], 1.0, tl.float32)
            acc = _scaled(v0, total)
        else:
            top = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc = _zeros(BLOCK_M, WIDTHS)
        for start in range(FIRST, count, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            k = _load(k_ptr, key, stride, count, WHOLE, HEAD_DIM, WIDTHS)
            v = _load(v_ptr, key, stride, count, WHOLE, HEAD_DIM, WIDTHS)
            s = _dots(q, k, WIDEN)
            if not WHOLE:
                s = tl.where((key < count)[None, :], s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - higher[:, None])
            fade = tl.exp2(top - higher)
            total = total * fade + tl.sum(p, 1)
            acc = _plus_product(_scaled(acc, fade), p.to(v[0].dtype), v, WIDEN)
            top = higher
        _store(out_ptr, query, out_stride, count, _scaled(acc, 1.0 / total), HEAD_DIM)
        tl.store(lse_ptr + query, (top + tl.log2(total)) / _LOG2E, query < count)


@triton.jit
def _attention_bwd_dq_kernel(
    qkv_ptr,  # [B, N, 3, HEADS, HEAD_DIM]
    strides,  # of qkv, (image, token), in units
    count,  # N
    out_ptr,  # [B, N, HEADS, HEAD_DIM], contiguous
    dout_ptr,  # [B, N, HEADS, HEAD_DIM], contiguous
    lse_ptr,  # [B, HEADS, N] fp32
    delta_ptr,  # [B, HEADS, N] fp32, written
    dqkv_ptr,  # [B, N, 3, HEADS, HEAD_DIM], contiguous
    FIRST: tl.constexpr,
    WHOLE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTHS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    image, head, block = _place(count, FIRST, BLOCK_M, HEADS)
    stride = tl.full([], UNIT, tl.int64) * strides[1]
    out_stride: tl.constexpr = HEADS * HEAD_DIM
    q_ptr = qkv_ptr + image * strides[0] * UNIT + head * HEAD_DIM
    k_ptr = q_ptr + out_stride
    v_ptr = k_ptr + out_stride
    dout_ptr += image * count * out_stride + head * HEAD_DIM
    out_ptr += image * count * out_stride + head * HEAD_DIM
    dq_ptr = dqkv_ptr + image * count * 3 * out_stride + head * HEAD_DIM
    lse_ptr += (image * HEADS + head) * count
    delta_ptr += (image * HEADS + head) * count
    scale: tl.constexpr = HEAD_DIM**-0.5 * _LOG2E

    zero = tl.arange(0, 1)
    if FIRST:
        k0 = _load(k_ptr, zero, stride, count, True, HEAD_DIM, WIDTHS)
        v0 = _load(v_ptr, zero, stride, count, True, HEAD_DIM, WIDTHS)

    if block < 0:
        if FIRST:
            q0 = _load(q_ptr, zero, stride, count, True, HEAD_DIM, WIDTHS)
            dout0 = _load(dout_ptr, zero, out_stride, count, True, HEAD_DIM, WIDTHS)
            out0 = _load(out_ptr, zero, out_stride, count, True, HEAD_DIM, WIDTHS)
            delta0 = _row_dots(dout0, out0)
            tl.store(delta_ptr + zero, delta0)
            lse0 = tl.load(lse_ptr + zero) * _LOG2E
            p0 = tl.exp2(_row_dots(q0, k0) * scale - lse0)
            dq0 = _scaled(k0, p0 * (_row_dots(dout0, v0) - delta0))
            for start in range(1, count, BLOCK_N):
                key = start + tl.arange(0, BLOCK_N)
                k = _load(k_ptr, key, stride, count, True, HEAD_DIM, WIDTHS)
                v = _load(v_ptr, key, stride, count, True, HEAD_DIM, WIDTHS)
                p = tl.exp2(_row_dots(k, q0) * scale - lse0)
                dq0 = _plus_row(dq0, p * (_row_dots(v, dout0) - delta0), k)
            _store(dq_ptr, zero, 3 * out_stride, count, dq0, HEAD_DIM, HEAD_DIM**-0.5)
    else:
        query = FIRST + block * BLOCK_M + tl.arange(0, BLOCK_M)
        q = _load(q_ptr, query, stride, count, False, HEAD_DIM, WIDTHS)
        dout = _load(dout_ptr, query, out_stride, count, False, HEAD_DIM, WIDTHS)
        out = _load(out_ptr, query, out_stride, count, False, HEAD_DIM, WIDTHS)
        delta = _row_dots(dout, out)
        tl.store(delta_ptr + query, delta, query < count)
        lse = tl.load(lse_ptr + query, query < count, other=0.0) * _LOG2E
        if FIRST:
            first_p = tl.exp2(_row_dots(q, k0) * scale - lse)
            dq = _scaled(k0, first_p * (_row_dots(dout, v0) - delta))
        else:
            dq = _zeros(BLOCK_M, WIDTHS)
        for start in range(FIRST, count, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            k = _load(k_ptr, key, stride, count, WHOLE, HEAD_DIM, WIDTHS)
            v = _load(v_ptr, key, stride, count, WHOLE, HEAD_DIM, WIDTHS)
            s = _dots(q, k, WIDEN)
            if not WHOLE:
                s = tl.where((key < count)[None, :], s, float("-inf"))
            p = tl.exp2(s * scale - lse[:, None])
            ds = p * (_dots(dout, v, WIDEN) - delta[:, None])
            dq = _plus_product(dq, ds.to(k[0].dtype), k, WIDEN)
        _store(dq_ptr, query, 3 * out_stride, count, dq, HEAD_DIM, HEAD_DIM**-0.5)


@triton.jit
def _attention_bwd_dkdv_kernel(
    qkv_ptr,  # [B, N, 3, HEADS, HEAD_DIM]
    strides,  # of qkv, (image, token), in units
    count,  # N
    dout_ptr,  # [B, N, HEADS, HEAD_DIM], contiguous
    lse_ptr,  # [B, HEADS, N] fp32
    delta_ptr,  # [B, HEADS, N] fp32
    dqkv_ptr,  # [B, N, 3, HEADS, HEAD_DIM], contiguous
    FIRST: tl.constexpr,
    WHOLE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTHS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    image, head, block = _place(count, FIRST, BLOCK_N, HEADS)
    stride = tl.full([], UNIT, tl.int64) * strides[1]
    out_stride: tl.constexpr = HEADS * HEAD_DIM
    q_ptr = qkv_ptr + image * strides[0] * UNIT + head * HEAD_DIM
    k_ptr = q_ptr + out_stride
    v_ptr = k_ptr + out_stride
    dout_ptr += image * count * out_stride + head * HEAD_DIM
    dk_ptr = dqkv_ptr + image * count * 3 * out_stride + out_stride + head * HEAD_DIM
    dv_ptr = dk_ptr + out_stride
    lse_ptr += (image * HEADS + head) * count
    delta_ptr += (image * HEADS + head) * count
    scale: tl.constexpr = HEAD_DIM**-0.5 * _LOG2E

    zero = tl.arange(0, 1)
    if FIRST:
        q0 = _load(q_ptr, zero, stride, count, True, HEAD_DIM, WIDTHS)
        dout0 = _load(dout_ptr, zero, out_stride, count, True, HEAD_DIM, WIDTHS)
        lse0 = tl.load(lse_ptr + zero) * _LOG2E
        delta0 = tl.load(delta_ptr + zero)

    if block < 0:
        if FIRST:
            k0 = _load(k_ptr, zero, stride, count, True, HEAD_DIM, WIDTHS)
            v0 = _load(v_ptr, zero, stride, count, True, HEAD_DIM, WIDTHS)
            p0 = tl.exp2(_row_dots(q0, k0) * scale - lse0)
            dk0 = _scaled(q0, p0 * (_row_dots(dout0, v0) - delta0))
            dv0 = _scaled(dout0, p0)
            for start in range(1, count, BLOCK_M):
                query = start + tl.arange(0, BLOCK_M)
                q = _load(q_ptr, query, stride, count, True, HEAD_DIM, WIDTHS)
                dout = _load(dout_ptr, query, out_stride, count, True, HEAD_DIM, WIDTHS)
                lse = tl.load(lse_ptr + query) * _LOG2E
                p = tl.exp2(_row_dots(q, k0) * scale - lse)
                ds = p * (_row_dots(dout, v0) - tl.load(delta_ptr + query))
                dk0 = _plus_row(dk0, ds, q)
                dv0 = _plus_row(dv0, p, dout)
            _store(dk_ptr, zero, 3 * out_stride, count, dk0, HEAD_DIM, HEAD_DIM**-0.5)
            _store(dv_ptr, zero, 3 * out_stride, count, dv0, HEAD_DIM)
    else:
        key = FIRST + block * BLOCK_N + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, key, stride, count, False, HEAD_DIM, WIDTHS)
        v = _load(v_ptr, key, stride, count, False, HEAD_DIM, WIDTHS)
        if FIRST:
            first_p = tl.exp2(_row_dots(k, q0) * scale - lse0)
            dk = _scaled(q0, first_p * (_row_dots(v, dout0) - delta0))
            dv = _scaled(dout0, first_p)
        else:
            dk = _zeros(BLOCK_N, WIDTHS)
            dv = _zeros(BLOCK_N, WIDTHS)
        for start in range(FIRST, count, BLOCK_M):
            query = start + tl.arange(0, BLOCK_M)
            q = _load(q_ptr, query, stride, count, WHOLE, HEAD_DIM, WIDTHS)
            dout = _load(dout_ptr, query, out_stride, count, WHOLE, HEAD_DIM, WIDTHS)
            # A query past the last has an infinite sum: its weights are zero.
            lse = tl.load(lse_ptr + query, query < count, other=float("inf")) * _LOG2E
            delta = tl.load(delta_ptr + query, query < count, other=0.0)
            p = tl.exp2(_dots(k, q, WIDEN) * scale - lse[None, :])
            dv = _plus_product(dv, p.to(dout[0].dtype), dout, WIDEN)
            ds = p * (_dots(v, dout, WIDEN) - delta[None, :])
            dk = _plus_product(dk, ds.to(q[0].dtype), q, WIDEN)
        _store(dk_ptr, key, 3 * out_stride, count, dk, HEAD_DIM, HEAD_DIM**-0.5)
        _store(dv_ptr, key, 3 * out_stride, count, dv, HEAD_DIM)


@triton.jit
def _place(count, FIRST: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr):
    """This program's image, head and block of tokens, -1 for a first token apart.

    The blocks of a head, which share what they walk over, come one after another.
    """
    blocks = tl.cdiv(count - FIRST, BLOCK) + FIRST
    head = tl.program_id(0) // blocks
    return (head // HEADS).to(tl.int64), head % HEADS, tl.program_id(0) % blocks - FIRST


@triton.jit
def _load(
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
def _store(ptr, token, stride, count, tiles, HEAD_DIM: tl.constexpr, FACTOR: tl.constexpr = 1.0):
    for i in tl.static_range(len(tiles)):
        column = i * tiles[0].shape[1] + tl.arange(0, tiles[i].shape[1])
        inside = (column < HEAD_DIM)[None, :] & (token < count)[:, None]
        at = ptr + token[:, None].to(tl.int64) * stride + column[None, :]
        tl.store(at, (tiles[i] * FACTOR).to(ptr.dtype.element_ty), inside)


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        tiles += (_zeros_tile(ROWS, WIDTHS[i]),)
    return tiles


@triton.jit
def _scaled(tiles, factors):
    """Rows `[R, D]`, or one row for all, times factors `[R]`, in fp32."""
    scaled = ()
    for i in tl.static_range(len(tiles)):
        scaled += (tiles[i].to(tl.float32) * factors[:, None],)
    return scaled


@triton.jit
def _row_dots(a, b):
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
def _plus_row(row, weights, tiles):
    """`row` `[1, D]` + Σ weights `[R]` · rows of `tiles` `[R, D]`, in fp32."""
    total = ()
    for i in tl.static_range(len(tiles)):
        weighted = tiles[i].to(tl.float32) * weights[:, None]
        total += (row[i] + tl.sum(weighted, 0)[None, :],)
    return total


@triton.jit
def _dots(a, b, WIDEN: tl.constexpr):
    """`a·bᵀ` `[R, S]` of `a` `[R, D]` and `b` `[S, D]`."""
    total = _dot(a[0], tl.trans(b[0]), None, WIDEN)
    for i in tl.static_range(1, len(a)):
        total = _dot(a[i], tl.trans(b[i]), total, WIDEN)
    return total


@triton.jit
def _plus_product(acc, weights, tiles, WIDEN: tl.constexpr):
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
