"""Full softmax attention from a packed projection, forward and backward.

    s = q·kᵀ / √head_dim        p = softmax(s)        out = p·v

and backward, with δ = Σ dout · out over a row, ds = p · (dout·vᵀ − δ) / √head_dim:

    dq = ds·k        dk = dsᵀ·q        dv = pᵀ·dout

Scores never reach memory: a program keeps a tile of queries (for dk and dv, of keys) and walks
over the others, forward with a running softmax. 4·N²·D FLOP an image forward and 10·N²·D backward
by the usual count; backward in fact computes s and dout·vᵀ twice, once for dq and once for dk and
dv, so that each result has one writer and no atomic adds, 14·N²·D (in fp32, 16).

q, k and v are read where they lie in the packed tensor. A head is one tile as wide as the next
power of two or, where that would waste more, two (72 is 64 + 16). Where one token is left over
from whole tiles (257 is a class token and 4 · 64), that token is computed apart, on the plain
cores: as a key it starts every running sum, as a query it has a program of its own. Whole tiles
then need no mask, and no tile is computed for the sake of one row.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from dimr_fast.kernels.attention_tiles import (
    dots,
    load,
    plus_product,
    plus_row,
    plus_rows,
    row_dots,
    scaled,
    store,
    tile_widths,
    zeros,
)
from dimr_fast.kernels.configuration import configuration

_LOG2E = tl.constexpr(1.4426950408889634)


def launch_fwd(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention `[B, N, D]` of packed `[B, N, 3·D]`, and each softmax's parts `[B, heads, 2, N]`.

    With s in units of ln 2, those are its top, max s, and its share, 1 / Σ exp2(s - top). Added
    up to one number, a log-sum-exp, they would cost each probability |top|·eps in backward.
    """
    images, count, width = qkv.shape
    out = torch.empty(images, count, width // 3, dtype=qkv.dtype, device=qkv.device)
    parts = torch.empty(images, heads, 2, count, dtype=torch.float32, device=qkv.device)
    if qkv.numel():
        qkv = _in_units(qkv, _unit(width // 3 // heads))
        _launch("attention_fwd", _attention_fwd_kernel, "BLOCK_M", qkv, heads, out, parts)
    return out, parts


def launch_bwd(
    dout: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, parts: torch.Tensor, heads: int
) -> torch.Tensor:
    """Gradient `[B, N, 3·D]` of the packed qkv, from what forward was given and returned."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if qkv.numel():
        qkv = _in_units(qkv, _unit(qkv.shape[2] // 3 // heads))
        dout, out, parts = dout.contiguous(), out.contiguous(), parts.contiguous()
        delta = parts.new_empty(parts.shape[0], heads, parts.shape[3])
        shared = (dout, parts, delta, dqkv)
        # In this order: the first kernel writes delta, the second reads it.
        _launch("attention_bwd_dq", _attention_bwd_dq_kernel, "BLOCK_M", qkv, heads, out, *shared)
        _launch("attention_bwd_dkdv", _attention_bwd_dkdv_kernel, "BLOCK_N", qkv, heads, *shared)
    return dqkv


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
    """How many elements a head is a whole number of, up to 16 bytes of 16-bit ones."""
    return math.gcd(head_dim, 8)


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
    parts_ptr,  # [B, HEADS, 2, N] fp32: top and share
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
    top_ptr = parts_ptr + (image * HEADS + head) * 2 * count
    share_ptr = top_ptr + count
    scale: tl.constexpr = HEAD_DIM**-0.5 * _LOG2E

    zero = tl.arange(0, 1)
    if FIRST:
        k0 = load(k_ptr, zero, stride, count, True, HEAD_DIM, WIDTHS)
        v0 = load(v_ptr, zero, stride, count, True, HEAD_DIM, WIDTHS)

    if block < 0:
        if FIRST:
            q0 = load(q_ptr, zero, stride, count, True, HEAD_DIM, WIDTHS)
            top0 = row_dots(q0, k0) * scale
            total0 = tl.full([1], 1.0, tl.float32)
            acc0 = scaled(v0, total0)
            for start in range(1, count, BLOCK_N):
                key = start + tl.arange(0, BLOCK_N)
                k = load(k_ptr, key, stride, count, True, HEAD_DIM, WIDTHS)
                v = load(v_ptr, key, stride, count, True, HEAD_DIM, WIDTHS)
                s = row_dots(k, q0) * scale
                higher = tl.maximum(top0, tl.max(s, 0))
                p = tl.exp2(s - higher)
                fade = tl.exp2(top0 - higher)
                total0 = total0 * fade + tl.sum(p, 0)
                acc0 = plus_row(scaled(acc0, fade), p, v)
                top0 = higher
            share0 = 1.0 / total0
            store(out_ptr, zero, out_stride, count, scaled(acc0, share0), HEAD_DIM)
            tl.store(top_ptr + zero, top0)
            tl.store(share_ptr + zero, share0)
    else:
        query = FIRST + block * BLOCK_M + tl.arange(0, BLOCK_M)
        q = load(q_ptr, query, stride, count, False, HEAD_DIM, WIDTHS)
        if FIRST:
            top = row_dots(q, k0) * scale
            total = tl.full([BLOCK_M], 1.0, tl.float32)
            acc = scaled(v0, total)
        else:
            top = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc = zeros(BLOCK_M, WIDTHS)
        for start in range(FIRST, count, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            k = load(k_ptr, key, stride, count, WHOLE, HEAD_DIM, WIDTHS)
            v = load(v_ptr, key, stride, count, WHOLE, HEAD_DIM, WIDTHS)
            s = dots(q, k, WIDEN)
            if not WHOLE:
                s = tl.where((key < count)[None, :], s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - higher[:, None])
            fade = tl.exp2(top - higher)
            total = total * fade + tl.sum(p, 1)
            acc = plus_product(scaled(acc, fade), p.to(v[0].dtype), v, WIDEN)
            top = higher
        share = 1.0 / total
        store(out_ptr, query, out_stride, count, scaled(acc, share), HEAD_DIM)
        tl.store(top_ptr + query, top, query < count)
        tl.store(share_ptr + query, share, query < count)


@triton.jit
def _attention_bwd_dq_kernel(
    qkv_ptr,  # [B, N, 3, HEADS, HEAD_DIM]
    strides,  # of qkv, (image, token), in units
    count,  # N
    out_ptr,  # [B, N, HEADS, HEAD_DIM], contiguous
    dout_ptr,  # [B, N, HEADS, HEAD_DIM], contiguous
    parts_ptr,  # [B, HEADS, 2, N] fp32: top and share
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
    top_ptr = parts_ptr + (image * HEADS + head) * 2 * count
    share_ptr = top_ptr + count
    delta_ptr += (image * HEADS + head) * count
    scale: tl.constexpr = HEAD_DIM**-0.5 * _LOG2E
    # A row of ds adds up to zero, but for the rounding of out, which 16 bits hide and fp32 shows:
    # a row whose tokens are all alike is then nothing but that. So in fp32 what is left of the sum
    # goes into delta, and out of dq.
    EXACT: tl.constexpr = qkv_ptr.dtype.element_ty == tl.float32

    zero = tl.arange(0, 1)
    if FIRST:
        k0 = load(k_ptr, zero, stride, count, True, HEAD_DIM, WIDTHS)
        v0 = load(v_ptr, zero, stride, count, True, HEAD_DIM, WIDTHS)

    if block < 0:
        if FIRST:
            q0 = load(q_ptr, zero, stride, count, True, HEAD_DIM, WIDTHS)
            dout0 = load(dout_ptr, zero, out_stride, count, True, HEAD_DIM, WIDTHS)
            out0 = load(out_ptr, zero, out_stride, count, True, HEAD_DIM, WIDTHS)
            delta0 = row_dots(dout0, out0)
            top0, share0 = tl.load(top_ptr + zero), tl.load(share_ptr + zero)
            p0 = tl.exp2(row_dots(q0, k0) * scale - top0) * share0
            ds0 = p0 * (row_dots(dout0, v0) - delta0)
            dq0 = scaled(k0, ds0)
            if EXACT:
                left0, mean0 = ds0, scaled(k0, p0)
            for start in range(1, count, BLOCK_N):
                key = start + tl.arange(0, BLOCK_N)
                k = load(k_ptr, key, stride, count, True, HEAD_DIM, WIDTHS)
                v = load(v_ptr, key, stride, count, True, HEAD_DIM, WIDTHS)
                p = tl.exp2(row_dots(k, q0) * scale - top0) * share0
                ds = p * (row_dots(v, dout0) - delta0)
                dq0 = plus_row(dq0, ds, k)
                if EXACT:
                    left0 += tl.sum(ds, 0)
                    mean0 = plus_row(mean0, p, k)
            if EXACT:
                delta0 += left0
                dq0 = plus_rows(dq0, -left0, mean0)
            tl.store(delta_ptr + zero, delta0)
            store(dq_ptr, zero, 3 * out_stride, count, dq0, HEAD_DIM, HEAD_DIM**-0.5)
    else:
        query = FIRST + block * BLOCK_M + tl.arange(0, BLOCK_M)
        q = load(q_ptr, query, stride, count, False, HEAD_DIM, WIDTHS)
        dout = load(dout_ptr, query, out_stride, count, False, HEAD_DIM, WIDTHS)
        out = load(out_ptr, query, out_stride, count, False, HEAD_DIM, WIDTHS)
        delta = row_dots(dout, out)
        top = tl.load(top_ptr + query, query < count, other=0.0)
        share = tl.load(share_ptr + query, query < count, other=0.0)
        if FIRST:
            first_p = tl.exp2(row_dots(q, k0) * scale - top) * share
            first_ds = first_p * (row_dots(dout, v0) - delta)
            dq = scaled(k0, first_ds)
            if EXACT:
                left, mean = first_ds, scaled(k0, first_p)
        else:
            dq = zeros(BLOCK_M, WIDTHS)
            if EXACT:
                left, mean = tl.zeros([BLOCK_M], tl.float32), zeros(BLOCK_M, WIDTHS)
        for start in range(FIRST, count, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            k = load(k_ptr, key, stride, count, WHOLE, HEAD_DIM, WIDTHS)
            v = load(v_ptr, key, stride, count, WHOLE, HEAD_DIM, WIDTHS)
            s = dots(q, k, WIDEN)
            if not WHOLE:
                s = tl.where((key < count)[None, :], s, float("-inf"))
            p = tl.exp2(s * scale - top[:, None]) * share[:, None]
            ds = p * (dots(dout, v, WIDEN) - delta[:, None])
            dq = plus_product(dq, ds.to(k[0].dtype), k, WIDEN)
            if EXACT:
                left += tl.sum(ds, 1)
                mean = plus_product(mean, p, k, WIDEN)
        if EXACT:
            delta += left
            dq = plus_rows(dq, -left, mean)
        tl.store(delta_ptr + query, delta, query < count)
        store(dq_ptr, query, 3 * out_stride, count, dq, HEAD_DIM, HEAD_DIM**-0.5)


@triton.jit
def _attention_bwd_dkdv_kernel(
    qkv_ptr,  # [B, N, 3, HEADS, HEAD_DIM]
    strides,  # of qkv, (image, token), in units
    count,  # N
    dout_ptr,  # [B, N, HEADS, HEAD_DIM], contiguous
    parts_ptr,  # [B, HEADS, 2, N] fp32: top and share
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
    top_ptr = parts_ptr + (image * HEADS + head) * 2 * count
    share_ptr = top_ptr + count
    delta_ptr += (image * HEADS + head) * count
    scale: tl.constexpr = HEAD_DIM**-0.5 * _LOG2E

    zero = tl.arange(0, 1)
    if FIRST:
        q0 = load(q_ptr, zero, stride, count, True, HEAD_DIM, WIDTHS)
        dout0 = load(dout_ptr, zero, out_stride, count, True, HEAD_DIM, WIDTHS)
        top0, share0 = tl.load(top_ptr + zero), tl.load(share_ptr + zero)
        delta0 = tl.load(delta_ptr + zero)

    if block < 0:
        if FIRST:
            k0 = load(k_ptr, zero, stride, count, True, HEAD_DIM, WIDTHS)
            v0 = load(v_ptr, zero, stride, count, True, HEAD_DIM, WIDTHS)
            p0 = tl.exp2(row_dots(q0, k0) * scale - top0) * share0
            dk0 = scaled(q0, p0 * (row_dots(dout0, v0) - delta0))
            dv0 = scaled(dout0, p0)
            for start in range(1, count, BLOCK_M):
                query = start + tl.arange(0, BLOCK_M)
                q = load(q_ptr, query, stride, count, True, HEAD_DIM, WIDTHS)
                dout = load(dout_ptr, query, out_stride, count, True, HEAD_DIM, WIDTHS)
                top, share = tl.load(top_ptr + query), tl.load(share_ptr + query)
                p = tl.exp2(row_dots(q, k0) * scale - top) * share
                ds = p * (row_dots(dout, v0) - tl.load(delta_ptr + query))
                dk0 = plus_row(dk0, ds, q)
                dv0 = plus_row(dv0, p, dout)
            store(dk_ptr, zero, 3 * out_stride, count, dk0, HEAD_DIM, HEAD_DIM**-0.5)
            store(dv_ptr, zero, 3 * out_stride, count, dv0, HEAD_DIM)
    else:
        key = FIRST + block * BLOCK_N + tl.arange(0, BLOCK_N)
        k = load(k_ptr, key, stride, count, False, HEAD_DIM, WIDTHS)
        v = load(v_ptr, key, stride, count, False, HEAD_DIM, WIDTHS)
        if FIRST:
            first_p = tl.exp2(row_dots(k, q0) * scale - top0) * share0
            dk = scaled(q0, first_p * (row_dots(v, dout0) - delta0))
            dv = scaled(dout0, first_p)
        else:
            dk = zeros(BLOCK_N, WIDTHS)
            dv = zeros(BLOCK_N, WIDTHS)
        for start in range(FIRST, count, BLOCK_M):
            query = start + tl.arange(0, BLOCK_M)
            q = load(q_ptr, query, stride, count, WHOLE, HEAD_DIM, WIDTHS)
            dout = load(dout_ptr, query, out_stride, count, WHOLE, HEAD_DIM, WIDTHS)
            # A query past the last has a share of zero, and so no weight.
            top = tl.load(top_ptr + query, query < count, other=0.0)
            share = tl.load(share_ptr + query, query < count, other=0.0)
            delta = tl.load(delta_ptr + query, query < count, other=0.0)
            p = tl.exp2(dots(k, q, WIDEN) * scale - top[None, :]) * share[None, :]
            dv = plus_product(dv, p.to(dout[0].dtype), dout, WIDEN)
            ds = p * (dots(v, dout, WIDEN) - delta[None, :])
            dk = plus_product(dk, ds.to(q[0].dtype), q, WIDEN)
        store(dk_ptr, key, 3 * out_stride, count, dk, HEAD_DIM, HEAD_DIM**-0.5)
        store(dv_ptr, key, 3 * out_stride, count, dv, HEAD_DIM)


@triton.jit
def _place(count, FIRST: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr):
    """This program's image, head and block of tokens, -1 for a first token apart.

    The blocks of a head, which share what they walk over, come one after another.
    """
    blocks = tl.cdiv(count - FIRST, BLOCK) + FIRST
    head = tl.program_id(0) // blocks
    return (head // HEADS).to(tl.int64), head % HEADS, tl.program_id(0) % blocks - FIRST
