"""Depthwise convolution on channels-last features, stride 1, zero padding, same size:

y[b, h, w, d] = bias[d] + Σ_ij weight[d, 0, i, j] · x[b, h + i − k//2, w + j − k//2, d]
"""

import math
from typing import Any

import torch
from torch import Tensor

from dimr_fast import reference
from dimr_fast.ops._checks import compute_dtype, dtype_name
from dimr_fast.ops._compiled import CPU, CUDA
from dimr_fast.ops.registration import Operator, differentiable

operator = Operator("depthwise_conv2d", CPU, CUDA, example=(4, 32, 32, 480))


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
        bias: [D], dtype and device of x, or None.
        residual: if True, add x to the result.
        implementation: "auto", "cpu", "cuda" or "reference".

    Returns [B, H, W, D] in the dtype of x or, under autocast, in autocast's dtype. With the
    residual the result always has the dtype of x, since autocast must not round the residual.
    Products are summed in fp32.
    Raises TypeError or ValueError with the name of the argument, and ValueError if a named
    implementation cannot run. Source: the ConvNeXt blocks of arXiv 2406.09416.
    """
    _check(x, weight, bias)
    dtype = compute_dtype(x)
    chosen = operator.select(implementation, x)
    if chosen == "reference":
        bias = None if bias is None else bias.to(dtype)
        y = reference.depthwise_conv2d(x.to(dtype), weight.to(dtype), bias)
        return x + y if residual else y
    if not residual:
        x = x.to(dtype)
    elif chosen == "cuda" or x.dtype != torch.float32:
        # The kernel multiplies in the dtype of the weights. Only the CPU kernel accepts weights of
        # lower precision than `x`.
        dtype = x.dtype
    x, weight = _last_contiguous(x), weight.to(dtype).contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()
    return _run(x, weight, bias, residual, chosen)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        if not (isinstance(value, Tensor) or (name == "bias" and value is None)):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, H, W, D] with H, W, D > 0")
    if not x.is_floating_point():
        raise TypeError(f"x: got dtype {dtype_name(x.dtype)}, expected floating point")
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
                f"{name}: got dtype {dtype_name(value.dtype)}, "
                f"expected that of x, {dtype_name(x.dtype)}"
            )


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


def _fwd_flops(x: list[int], weight: list[int], *options: Any, out_shape: Any) -> int:
    return 2 * math.prod(x) * weight[-1] ** 2


def _bwd_flops(
    dy: list[int],
    x: list[int],
    weight: list[int],
    residual: bool,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    *,
    out_shape: Any,
) -> int:
    return (needs_dx + needs_dweight) * _fwd_flops(x, weight, out_shape=x)


_FWD = "(Tensor x, Tensor weight, Tensor? bias, bool residual) -> Tensor"
_BWD = (
    "(Tensor dy, Tensor x, Tensor weight, bool residual,"
    " bool needs_dx, bool needs_dweight, bool needs_dbias) -> (Tensor, Tensor, Tensor)"
)
_fwd = operator.define("fwd", _FWD, _fwd_shapes, flops=_fwd_flops)
_bwd = operator.define("bwd", _BWD, _bwd_shapes, flops=_bwd_flops)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(
    ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, implementation: str
) -> Tensor:
    ctx.save_for_backward(x, weight)
    ctx.residual, ctx.implementation = residual, implementation
    return _fwd[implementation](x, weight, bias, residual)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    grads = _bwd[ctx.implementation](_last_contiguous(dy), x, weight, ctx.residual, *wanted)
    dtypes = (x.dtype, weight.dtype, weight.dtype)
    return (
        *(
            grad.to(dtype) if needed else None
            for grad, dtype, needed in zip(grads, dtypes, wanted, strict=True)
        ),
        None,
        None,
    )


_run = differentiable(_forward, _backward)
