"""Full softmax attention from a packed projection, forward and backward.

    s = q·kᵀ / √head_dim        p = softmax(s)        out = p·v

and backward, with δ = Σ dout · out over a row, ds = p · (dout·vᵀ − δ) / √head_dim:

    dq = ds·k        dk = dsᵀ·q        dv = pᵀ·dout

Scores are never written to memory: a program keeps a tile of queries (for dk and dv, of keys) and
loops over the tiles of keys (queries), in forward with a running softmax. By the usual count
forward has 4·N²·D FLOP per image and backward 10·N²·D. This backward computes s and dout·vᵀ twice,
once for dq and once for dk and dv: 14·N²·D (in fp32 16·N²·D). So each result has one writer and
needs no atomic adds.

q, k and v are read in place from the packed tensor. A head is one tile as wide as the next power of
two or, if that wastes more, two tiles (72 = 64 + 16). If whole tiles leave one token over (257 is a
class token and 4 · 64 positions), the first token has a tile of its own with the fewest rows that
the tensor cores take: as a key it precedes the other keys, as a query it has its own program. Whole
tiles then need no mask. attention.md gives the reasons and the figures.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from dimr_fast.kernels.attention_backward import (
    attention_bwd_dkdv_kernel,
    attention_bwd_dq_kernel,
)
from dimr_fast.kernels.attention_tiles import (
    FIRST_ROWS,
    LOG2E,
    dots,
    load,
    place,
    plus_product,
    scaled,
    store,
    store_row,
    tile_widths,
    zeros,
)
from dimr_fast.kernels.configuration import configuration


def launch_fwd(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention `[B, N, D]` of packed `[B, N, 3·D]` and softmax parts `[B, heads, 2, N]`.

    With s in units of ln 2, the two parts of a row are top = max s and share =
    1 / Σ exp2(s - top). They are not merged into one log-sum-exp, because backward would then lose
    |top|·eps of each probability to rounding.
    """
    images, count, width = qkv.shape
    out = torch.empty(images, count, width // 3, dtype=qkv.dtype, device=qkv.device)
    parts = torch.empty(images, heads, 2, count, dtype=torch.float32, device=qkv.device)
    if qkv.numel():
        qkv = _in_units(qkv, _unit(width // 3 // heads))
        _launch("attention_fwd", attention_fwd_kernel, "BLOCK_M", qkv, heads, out, parts)
    return out, parts


def launch_bwd(
    dout: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, parts: torch.Tensor, heads: int
) -> torch.Tensor:
    """Return the gradient `[B, N, 3·D]` of qkv from the inputs and results of forward."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if qkv.numel():
        qkv = _in_units(qkv, _unit(qkv.shape[2] // 3 // heads))
        dout, out, parts = dout.contiguous(), out.contiguous(), parts.contiguous()
        statistics = parts.new_empty(parts.shape[0], heads, parts.shape[3], 4)
        shared = (dout, statistics, dqkv)
        # The order matters: the first kernel writes the statistics that the second reads.
        dq = (attention_bwd_dq_kernel, "BLOCK_M", qkv, heads, out, parts)
        _launch("attention_bwd_dq", *dq, *shared)
        _launch("attention_bwd_dkdv", attention_bwd_dkdv_kernel, "BLOCK_N", qkv, heads, *shared)
    return dqkv


def _launch(
    table: str, kernel: Any, own: str, qkv: torch.Tensor, heads: int, *tensors: torch.Tensor
) -> None:
    """Launch one program per image, head and tile of `own` tokens, plus one for a first token."""
    images, count, width = qkv.shape
    head_dim = width // 3 // heads
    # fp32 tiles take twice the memory and do not use the tensor cores.
    table += "_fp32" if qkv.dtype == torch.float32 else ""
    constants = configuration(table, head_dim, qkv.device)
    step = constants["BLOCK_N" if own == "BLOCK_M" else "BLOCK_M"]
    first, unit = int(count % step == 1), _unit(head_dim)
    kernel[(images * heads * (triton.cdiv(count - first, constants[own]) + first),)](
        qkv,
        qkv.stride(0) // unit,
        count,
        *tensors,
        STRIDE=qkv.stride(1),
        UNIT=unit,
        FIRST=first,
        WHOLE=(count - first) % step == 0,
        HEADS=heads,
        HEAD_DIM=head_dim,
        WIDTHS=tile_widths(head_dim),
        FIRST_WIDTHS=tile_widths(head_dim, most=1),
        **constants,
    )


def _unit(head_dim: int) -> int:
    """Return the largest unit, up to 8 elements (16 bytes in 16 bits), that divides a head."""
    return math.gcd(head_dim, 8)


def _in_units(qkv: torch.Tensor, unit: int) -> torch.Tensor:
    """Return `qkv`, or a contiguous copy if its last axis is strided or a stride is not in units.

    Kernels receive strides in units, so that the compiler knows how many elements one load can
    take.
    """
    fits = qkv.stride(2) == 1 and qkv.stride(0) % unit == qkv.stride(1) % unit == 0
    return qkv if fits else qkv.contiguous()


@triton.jit
def attention_fwd_kernel(
    qkv_ptr,  # [B, N, 3, HEADS, HEAD_DIM]
    image_stride,  # of qkv, in units
    count,  # N
    out_ptr,  # [B, N, HEADS, HEAD_DIM], contiguous
    parts_ptr,  # [B, HEADS, 2, N] fp32: top and share
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
    top_ptr = parts_ptr + (image * HEADS + head) * 2 * count
    if block < 0:
        if FIRST:
            _fwd_tile(
                q_ptr,
                0,
                1,
                FIRST_ROWS,
                out_ptr,
                top_ptr,
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
        _fwd_tile(
            q_ptr,
            FIRST + block * BLOCK_M,
            count,
            BLOCK_M,
            out_ptr,
            top_ptr,
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
def _fwd_tile(
    q_ptr,
    start,
    end,
    BLOCK_M: tl.constexpr,
    out_ptr,
    top_ptr,
    count,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    WHOLE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute a tile of queries from `start` (those before `end`) against all keys."""
    q = load(q_ptr, start, end, BLOCK_M, False, STRIDE, HEAD_DIM, WIDTHS)
    k_ptr = q_ptr + WIDTH
    v_ptr = k_ptr + WIDTH
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = zeros(BLOCK_M, WIDTHS)
    if FIRST:
        top, total, acc = _fwd_keys(
            q, top, total, acc, k_ptr, v_ptr, 0, 1, FIRST_ROWS, False, STRIDE, HEAD_DIM, WIDTHS
        )
    for key in range(FIRST, count, BLOCK_N):
        top, total, acc = _fwd_keys(
            q, top, total, acc, k_ptr, v_ptr, key, count, BLOCK_N, WHOLE, STRIDE, HEAD_DIM, WIDTHS
        )
    share = 1.0 / total
    store(out_ptr, start, end, WIDTH, scaled(acc, share), HEAD_DIM)
    store_row(top_ptr, start, end, top)
    store_row(top_ptr + count, start, end, share)


@triton.jit
def _fwd_keys(
    q,
    top,
    total,
    acc,
    k_ptr,
    v_ptr,
    start,
    end,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """Add a tile of keys to the running softmax: maximum, sum and weighted values."""
    scale: tl.constexpr = HEAD_DIM**-0.5 * LOG2E
    k = load(k_ptr, start, end, BLOCK_N, WHOLE, STRIDE, HEAD_DIM, WIDTHS)
    v = load(v_ptr, start, end, BLOCK_N, WHOLE, STRIDE, HEAD_DIM, WIDTHS)
    s = dots(q, k)
    if not WHOLE:
        s = tl.where((start + tl.arange(0, BLOCK_N) < end)[None, :], s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - higher[:, None])
    fade = tl.exp2(top - higher)
    total = total * fade + tl.sum(p, 1)
    acc = plus_product(scaled(acc, fade), p.to(v[0].dtype), v)
    return higher, total, acc
