"""Depthwise convolution on channels-last features, stride 1, zero padding, same size:

y[b, h, w, d] = bias[d] + Σ_ij weight[d, 0, i, j] · x[b, h + i − k//2, w + j − k//2, d]
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dimr_fast import reference
from dimr_fast.ops import _compiled
from dimr_fast.ops._checks import compute_dtype
from dimr_fast.ops.implementations import Implementations

implementations = Implementations(
    "depthwise_conv2d",
    example=(4, 32, 32, 480),
    cpu=_compiled.why_not_cpu,
    cuda=_compiled.why_not_cuda,
)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """Convolve each channel with its own odd k×k kernel, zero padding, same size.

    Args:
        x: [B, H, W, D], any strides; float32, bfloat16, float16 (float64: reference only).
        weight: [D, 1, k, k], k odd, dtype and device of x.
        bias: [D] or None, likewise.
        residual: add x to the result.
        implementation: "auto", "cpu", "cuda" or "reference".

    Returns [B, H, W, D], in the dtype of x or, under autocast, in autocast's; with the residual,
    which autocast does not round, in the dtype of x. Sums are fp32.
    Raises TypeError and ValueError naming the argument; ValueError also where a named
    implementation cannot run. Source: the ConvNeXt blocks of arXiv 2406.09416.
    """
    _check(x, weight, bias)
    dtype = compute_dtype(x)
    chosen = implementations.select(implementation, x)
    if chosen == "reference":
        bias = None if bias is None else bias.to(dtype)
        y = reference.depthwise_conv2d(x.to(dtype), weight.to(dtype), bias)
        return x + y if residual else y
    if not residual:
        x = x.to(dtype)
    elif chosen == "cuda" or x.dtype != torch.float32:
        # Products are taken in the dtype of the weights, in a narrower one than x on a CPU only.
        dtype = x.dtype
    x, weight = _last_contiguous(x), weight.to(dtype).contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()
    run = _DepthwiseConv2d.apply if torch.is_grad_enabled() else _fwd
    return run(x, weight, bias, residual)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        if not (isinstance(value, Tensor) or (name == "bias" and value is None)):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, H, W, D] with H, W, D > 0")
    if not x.is_floating_point():
        raise TypeError(f"x: got dtype {_name(x.dtype)}, expected floating point")
    d, k = x.shape[-1], weight.shape[-1] if weight.dim() else 0
    if tuple(weight.shape) != (d, 1, k, k) or k % 2 == 0:
        shape = tuple(weight.shape)
        raise ValueError(f"weight: got shape {shape}, expected [{d}, 1, k, k] with odd k")
    if bias is not None and tuple(bias.shape) != (d,):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected [{d}]")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if value.device != x.device:
            raise ValueError(f"{name}: got device {value.device}, expected that of x, {x.device}")
        if value.dtype != x.dtype and compute_dtype(value) != compute_dtype(x):
            raise TypeError(
                f"{name}: got dtype {_name(value.dtype)}, expected that of x, {_name(x.dtype)}"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fwd_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> Tensor:
    return x.new_empty(x.shape)


def _bwd_shapes(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: bool,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if needs_dx else (0,))
    dweight = x.new_empty(weight.shape if needs_dweight else (0,), dtype=torch.float32)
    dbias = x.new_empty(x.shape[-1:] if needs_dbias else (0,), dtype=torch.float32)
    return dx, dweight, dbias


_fwd = _compiled.declare(
    "depthwise_conv2d",
    "fwd",
    "(Tensor x, Tensor weight, Tensor? bias, bool residual) -> Tensor",
    _fwd_shapes,
)
_bwd = _compiled.declare(
    "depthwise_conv2d",
    "bwd",
    "(Tensor dy, Tensor x, Tensor weight, bool residual,"
    " bool needs_dx, bool needs_dweight, bool needs_dbias) -> (Tensor, Tensor, Tensor)",
    _bwd_shapes,
)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.residual = residual
        return _fwd(x, weight, bias, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        grads = _bwd(_last_contiguous(dy), x, weight, ctx.residual, *wanted)
        dtypes = (x.dtype, weight.dtype, weight.dtype)
        return (
            *(
                grad.to(dtype) if needed else None
                for grad, dtype, needed in zip(grads, dtypes, wanted, strict=True)
            ),
            None,
        )
