"""The gate of the gated MLP (paper section 3.3)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dimr_fast import reference
from dimr_fast.ops._checks import check_floating, compute_dtype
from dimr_fast.ops._compiled import CPU
from dimr_fast.ops._triton import TRITON
from dimr_fast.ops.fp8 import FP8Rows, fp8_implementations, fp8_shapes
from dimr_fast.ops.linear import check_layers, layers_forward, layers_gradients, linear
from dimr_fast.ops.registration import Operator, differentiable

operator = Operator("gated_gelu", TRITON, CPU, example=(4, 257, 3840))
fp8 = fp8_implementations("gated_gelu_fp8", example=(4, 257, 3840))


def gated_gelu(
    x: Tensor,
    weights: Sequence[Tensor] = (),
    biases: Sequence[Tensor] = (),
    *,
    implementation: str = "auto",
) -> Tensor:
    """Compute `gelu(a) · b` with the exact (erf) GELU, for `x` = `[a, b]` along the last axis.

    `x` is `[…, 2·hidden]`, the output of the merged input projections; the result is `[…, hidden]`
    in the dtype of `x`. With `weights` it is `linear([gelu(a) · b], weights, biases)`; the gate's
    own result is then not kept for backward.
    Raises ValueError if the last axis is odd, the dtype is not floating point, a layer does not fit
    or the implementation cannot run.
    """
    _check(x)
    check_layers(x, x.shape[-1] // 2, weights, biases)
    chosen = operator.select(implementation, x)
    if chosen != "reference":
        return _run(x, chosen, compute_dtype(x), len(weights), *weights, *biases)
    y = reference.gated_gelu(x)
    return linear([y], weights, biases, implementation=implementation) if weights else y


def gated_gelu_fp8(x: Tensor, *, implementation: str = "auto") -> FP8Rows:
    """Compute `gated_gelu` of `x` `[…, 2·hidden]` as FP8 rows `[…, hidden]`.

    The input of `linear_fp8`: the result is quantised in the same pass, without being rounded to
    the dtype of `x` first. No gradients are recorded.
    Raises ValueError if the last axis is odd or empty, the dtype is not floating point or the
    implementation cannot run.
    """
    _check(x)
    if not x.shape[-1]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected a last axis of 2 or more")
    if fp8.select(implementation, x) == "triton":
        return FP8Rows(*_fp8(x))
    return FP8Rows(*reference.gated_gelu_fp8(x))


def _check(x: Tensor) -> None:
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected an even last axis, 2·hidden")
    check_floating(x=x)


def _fwd_shapes(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _bwd_shapes(dy: Tensor, x: Tensor, needs_y: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(dy.shape if needs_y else (0,))


def _fp8_shapes(x: Tensor) -> tuple[Tensor, Tensor]:
    return fp8_shapes(x, x.shape[-1] // 2)


_fwd = operator.define("fwd", "(Tensor x) -> Tensor", _fwd_shapes)
_bwd = operator.define(
    "bwd", "(Tensor dy, Tensor x, bool needs_y) -> (Tensor, Tensor)", _bwd_shapes
)
_fp8 = operator.define("fp8", "(Tensor x) -> (Tensor, Tensor)", _fp8_shapes, "triton")["triton"]


def _forward(ctx: Any, *given: Any) -> Tensor:
    x, implementation, dtype, layers, *parameters = given
    y = _fwd[implementation](x)
    weight: list[Tensor] = []
    if layers:
        y, *weight, _ = layers_forward(ctx, [y], parameters, layers, dtype)
    ctx.save_for_backward(x, *weight)
    ctx.implementation = implementation
    return y


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, *weight = ctx.saved_tensors
    dy = (dout @ weight[0]).to(x.dtype) if weight else dout
    dx, y = _bwd[ctx.implementation](dy, x, len(weight) > 0)
    grads: list[Tensor | None] = []
    if weight:
        grads = layers_gradients(ctx, dout, [y], ctx.needs_input_grad[4:])
    return dx, None, None, None, *grads


_run = differentiable(_forward, _backward)
