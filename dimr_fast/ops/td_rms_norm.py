"""Root-mean-square norm with a time-dependent scale (paper section 3.2)."""

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from dimr_fast import reference
from dimr_fast.ops._checks import (
    check_device,
    check_residual,
    check_time_values,
    check_width,
    compute_dtype,
)
from dimr_fast.ops._compiled import CPU
from dimr_fast.ops._triton import TRITON
from dimr_fast.ops.fp8 import FP8Rows, fp8_implementations, fp8_norm_shapes
from dimr_fast.ops.linear import check_layers, layers_forward, layers_gradients, linear
from dimr_fast.ops.registration import Operator, differentiable

operator = Operator("td_rms_norm", TRITON, CPU, example=(4, 257, 960))
fp8 = fp8_implementations("td_rms_norm_fp8", example=(4, 257, 960))


@overload
def td_rms_norm(
    x: Tensor,
    scale: Tensor,
    residual: None = None,
    weights: Sequence[Tensor] = (),
    biases: Sequence[Tensor] = (),
    *,
    implementation: str = "auto",
) -> Tensor: ...
@overload
def td_rms_norm(
    x: Tensor,
    scale: Tensor,
    residual: Tensor,
    weights: Sequence[Tensor] = (),
    biases: Sequence[Tensor] = (),
    *,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def td_rms_norm(
    x: Tensor,
    scale: Tensor,
    residual: Tensor | None = None,
    weights: Sequence[Tensor] = (),
    biases: Sequence[Tensor] = (),
    *,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `s / (rms(s) + 1e-8) · scale` over the last axis of `s = x` or `s = residual + x`.

    `x` and `residual` (optional) are `[B, …, D]` in fp32, bf16 or fp16; `scale` is `[T, D]`, where
    T is B (a time per image) or 1. Statistics are fp32; the result has the shape of `x` and its
    dtype; under autocast, the autocast dtype. With a residual the result is `(s, normed s)`. With
    `weights`, `linear([normed s], weights, biases)` takes the place of normed s, which is then not
    kept for backward. Raises ValueError if shapes or devices do not fit or the implementation
    cannot run.
    """
    check_time_values(x, scale=scale)
    check_residual(x, residual)
    check_layers(x, x.shape[-1], weights, biases)
    chosen = operator.select(implementation, x)
    if chosen != "reference":
        dtype = compute_dtype(x)
        return _run(x, residual, scale, dtype, chosen, len(weights), *weights, *biases)
    summed = x if residual is None else residual + x
    y = reference.td_rms_norm(summed, scale).to(compute_dtype(x))
    y = linear([y], weights, biases, implementation=implementation) if weights else y
    return y if residual is None else (summed, y)


def td_rms_norm_into(
    out: Tensor, x: Tensor, scale: Tensor, residual: Tensor | None, bias: Tensor
) -> Tensor:
    """Write `s + bias` to `out` and return normed `s`, where `s = x` or `s = residual + x`.

    The caller can then add the product of a linear layer to `out` in place, as the last step of a
    block; `bias` `[D]` is the bias of that layer. `out` has the shape and dtype of `x`; its last
    axis is contiguous, its other strides are arbitrary. Only Triton implements this, without
    gradients. All else is as in `td_rms_norm`.
    Raises ValueError if shapes, dtypes, strides or devices do not fit or Triton cannot run.
    """
    check_time_values(x, scale=scale)
    check_residual(x, residual)
    check_width(x, bias, "bias")
    if (out.shape, out.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"out: got {tuple(out.shape)}, {out.dtype}, expected {tuple(x.shape)}, {x.dtype}"
        )
    check_device(x, out, "out")
    operator.select("triton", x)
    return _into(out, x, residual, scale, bias)


def td_rms_norm_fp8(
    x: Tensor, scale: Tensor, residual: Tensor | None = None, *, implementation: str = "auto"
) -> tuple[Tensor, FP8Rows]:
    """Return `s` and its norm as FP8 rows, where `s = x` or `s = residual + x`.

    The input of `linear_fp8`: the norm is quantised in the same pass, without being rounded to the
    dtype of `x` first. No gradients are recorded. All else is as in `td_rms_norm`.
    Raises ValueError if shapes or devices do not fit or the implementation cannot run.
    """
    check_time_values(x, scale=scale)
    check_residual(x, residual)
    if fp8.select(implementation, x) == "triton":
        summed, values, scales = _fp8(x, residual, scale)
        return x if residual is None else summed, FP8Rows(values, scales)
    summed = x if residual is None else residual + x
    return summed, FP8Rows(*reference.td_rms_norm_fp8(summed, scale))


def _fwd_shapes(
    x: Tensor, residual: Tensor | None, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    summed = y.new_empty(0)
    if residual is not None:
        summed = y.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    rms = y.new_empty((x.shape[0], math.prod(x.shape[1:-1])), dtype=torch.float32)
    return summed, y, rms


def _bwd_shapes(
    dy: Tensor, dsum: Tensor | None, x: Tensor, scale: Tensor, rms: Tensor, needs_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dscale = dy.new_empty(scale.shape, dtype=torch.float32)
    return x.new_empty(x.shape), dscale, dy.new_empty(dy.shape if needs_y else (0,))


def _into_shapes(
    out: Tensor, x: Tensor, residual: Tensor | None, scale: Tensor, bias: Tensor
) -> Tensor:
    return x.new_empty(x.shape)


_FWD = "(Tensor x, Tensor? residual, Tensor scale, ScalarType dtype) -> (Tensor, Tensor, Tensor)"
_BWD = (
    "(Tensor dy, Tensor? dsum, Tensor x, Tensor scale, Tensor rms, bool needs_y)"
    " -> (Tensor, Tensor, Tensor)"
)
_INTO = "(Tensor(a!) out, Tensor x, Tensor? residual, Tensor scale, Tensor bias) -> Tensor"
_FP8 = "(Tensor x, Tensor? residual, Tensor scale) -> (Tensor, Tensor, Tensor)"
_fwd = operator.define("fwd", _FWD, _fwd_shapes)
_bwd = operator.define("bwd", _BWD, _bwd_shapes)
_into = operator.define("into", _INTO, _into_shapes, "triton")["triton"]
_fp8 = operator.define("fp8", _FP8, fp8_norm_shapes, "triton")["triton"]


def _forward(ctx: Any, *given: Any) -> Tensor | tuple[Tensor, Tensor]:
    x, residual, scale, dtype, implementation, layers, *parameters = given
    summed, y, rms = _fwd[implementation](x, residual, scale, dtype)
    weight: list[Tensor] = []
    if layers:
        y, *weight, _ = layers_forward(ctx, [y], parameters, layers, dtype)
    ctx.save_for_backward(x if residual is None else summed, scale, rms, *weight)
    ctx.implementation = implementation
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.set_materialize_grads(False)
    return y if residual is None else (summed, y)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    summed, scale, rms, *weight = ctx.saved_tensors
    dsum, dout = grads if len(grads) == 2 else (None, grads[0])
    x_dtype, residual_dtype = ctx.dtypes
    wanted = ctx.needs_input_grad[6:]
    dparameters: list[Tensor | None] = [None] * len(wanted)
    if dout is None:
        dx, dscale = dsum, None
    else:
        dy = dout @ weight[0] if weight else dout
        dx, dscale, y = _bwd[ctx.implementation](dy, dsum, summed, scale, rms, len(weight) > 0)
        dscale = dscale.to(scale.dtype)
        if weight:
            dparameters = layers_gradients(ctx, dout, [y], wanted)
    dresidual = None
    if dx is not None:
        dresidual = None if residual_dtype is None else dx.to(residual_dtype)
        dx = dx.to(x_dtype)
    return dx, dresidual, dscale, None, None, None, *dparameters


_run = differentiable(_forward, _backward)
