"""Layer norm with a time-dependent scale and shift: TD-LN (paper section 3.2)."""

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from dimr_fast import reference
from dimr_fast.ops._checks import check_residual, check_time_values, compute_dtype
from dimr_fast.ops._compiled import CPU
from dimr_fast.ops._triton import TRITON
from dimr_fast.ops.fp8 import FP8Rows, fp8_implementations, fp8_norm_shapes
from dimr_fast.ops.linear import check_layers, layers_forward, layers_gradients, linear
from dimr_fast.ops.registration import Operator, differentiable

operator = Operator("td_layer_norm", TRITON, CPU, example=(4, 257, 960))
fp8 = fp8_implementations("td_layer_norm_fp8", example=(4, 257, 960))


@overload
def td_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: None = None,
    weights: Sequence[Tensor] = (),
    biases: Sequence[Tensor] = (),
    *,
    implementation: str = "auto",
) -> Tensor: ...
@overload
def td_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    weights: Sequence[Tensor] = (),
    biases: Sequence[Tensor] = (),
    *,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def td_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    weights: Sequence[Tensor] = (),
    biases: Sequence[Tensor] = (),
    *,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `layer_norm(s) · weight + bias` (eps 1e-5) of `s = x` or `s = residual + x`.

    `x` and `residual` (optional) are `[B, …, D]` in fp32, bf16 or fp16; `weight` and `bias` are
    `[T, D]`, where T is B (a time per image) or 1. Statistics are fp32; the result has the shape of
    `x` and its dtype; under autocast, the autocast dtype. With a residual the result is `(s, normed
    s)`. With `weights`, `linear([normed s], weights, biases)` takes the place of normed s, which is
    then not kept for backward. Raises ValueError if shapes or devices do not fit or the
    implementation cannot run.
    """
    check_time_values(x, weight=weight, bias=bias)
    check_residual(x, residual)
    check_layers(x, x.shape[-1], weights, biases)
    chosen = operator.select(implementation, x)
    if chosen != "reference":
        dtype = compute_dtype(x)
        return _run(x, residual, weight, bias, dtype, chosen, len(weights), *weights, *biases)
    summed = x if residual is None else residual + x
    y = reference.td_layer_norm(summed, weight, bias).to(compute_dtype(x))
    y = linear([y], weights, biases, implementation=implementation) if weights else y
    return y if residual is None else (summed, y)


def td_layer_norm_fp8(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    implementation: str = "auto",
) -> tuple[Tensor, FP8Rows]:
    """Return `s` and its norm as FP8 rows, where `s = x` or `s = residual + x`.

    The input of `linear_fp8`: the norm is quantised in the same pass, without being rounded to the
    dtype of `x` first. No gradients are recorded. All else is as in `td_layer_norm`.
    Raises ValueError if shapes or devices do not fit or the implementation cannot run.
    """
    check_time_values(x, weight=weight, bias=bias)
    check_residual(x, residual)
    if fp8.select(implementation, x) == "triton":
        summed, values, scales = _fp8(x, residual, weight, bias)
        return x if residual is None else summed, FP8Rows(values, scales)
    summed = x if residual is None else residual + x
    return summed, FP8Rows(*reference.td_layer_norm_fp8(summed, weight, bias))


def _fwd_shapes(
    weight: Tensor,
    bias: Tensor,
    pieces: Sequence[Tensor],
    residual: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = pieces[0]
    summed = x.new_empty(0, dtype=dtype)
    if residual is not None:
        summed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    y = x.new_empty((*x.shape[:-1], len(pieces) * x.shape[-1]), dtype=dtype)
    rows = (x.shape[0], math.prod(x.shape[1:-1]))
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return summed, y, mean, rstd


def _bwd_shapes(
    dy: Tensor,
    dsum: Tensor | None,
    pieces: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs_dx: bool,
    needs_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = pieces[0]
    dx = x.new_empty((len(pieces), *x.shape) if needs_dx else (0,))
    times = max(weight.shape[0], bias.shape[0])
    parameters = dy.new_empty((2, times, weight.shape[1]), dtype=torch.float32)
    return dx, parameters, dy.new_empty(dy.shape if needs_y else (0,))


_FWD = (
    "(Tensor weight, Tensor bias, Tensor[] pieces, Tensor? residual, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_BWD = (
    "(Tensor dy, Tensor? dsum, Tensor[] pieces, Tensor weight, Tensor bias, Tensor mean,"
    " Tensor rstd, bool needs_dx, bool needs_y) -> (Tensor, Tensor, Tensor)"
)
_FP8 = "(Tensor x, Tensor? residual, Tensor weight, Tensor bias) -> (Tensor, Tensor, Tensor)"
fwd = operator.define("fwd", _FWD, _fwd_shapes)
bwd = operator.define("bwd", _BWD, _bwd_shapes)
_fp8 = operator.define("fp8", _FP8, fp8_norm_shapes, "triton")["triton"]


def parameter_gradients(both: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `weight` and `bias` from `both` `[2, T, D]`, those of every time.

    A parameter with a single time gets the sum over the times.
    """
    dweight, dbias = (
        (g.sum(0, keepdim=True) if value.shape[0] < g.shape[0] else g).to(value.dtype)
        for g, value in zip(both.unbind(), (weight, bias), strict=True)
    )
    return dweight, dbias


def _forward(ctx: Any, *given: Any) -> Tensor | tuple[Tensor, Tensor]:
    x, residual, weight, bias, dtype, implementation, layers, *parameters = given
    summed, y, mean, rstd = fwd[implementation](weight, bias, [x], residual, dtype)
    layers_weight: list[Tensor] = []
    if layers:
        y, *layers_weight, _ = layers_forward(ctx, [y], parameters, layers, dtype)
    normed = x if residual is None else summed
    ctx.save_for_backward(normed, weight, bias, mean, rstd, *layers_weight)
    ctx.implementation = implementation
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.set_materialize_grads(False)
    return y if residual is None else (summed, y)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    summed, weight, bias, mean, rstd, *layers_weight = ctx.saved_tensors
    dsum, dout = grads if len(grads) == 2 else (None, grads[0])
    x_dtype, residual_dtype = ctx.dtypes
    wanted = ctx.needs_input_grad[7:]
    dparameters: list[Tensor | None] = [None] * len(wanted)
    if dout is None:
        dx, dweight, dbias = dsum, None, None
    else:
        dy = dout @ layers_weight[0] if layers_weight else dout
        dx, both, y = bwd[ctx.implementation](
            dy, dsum, [summed], weight, bias, mean, rstd, True, len(layers_weight) > 0
        )
        dx = dx[0]
        dweight, dbias = parameter_gradients(both, weight, bias)
        if layers_weight:
            dparameters = layers_gradients(ctx, dout, [y], wanted)
    dresidual = None
    if dx is not None:
        dresidual = None if residual_dtype is None else dx.to(residual_dtype)
        dx = dx.to(x_dtype)
    return dx, dresidual, dweight, dbias, None, None, None, *dparameters


_run = differentiable(_forward, _backward)
