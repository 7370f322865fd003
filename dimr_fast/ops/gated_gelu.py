"""The gate of the gated MLP (paper section 3.3)."""

from typing import Any

from torch import Tensor

from dimr_fast import reference
from dimr_fast.ops._checks import check_floating
from dimr_fast.ops._compiled import CPU
from dimr_fast.ops._triton import TRITON
from dimr_fast.ops.registration import Operator, differentiable

operator = Operator("gated_gelu", TRITON, CPU, example=(4, 257, 3840))


def gated_gelu(x: Tensor, *, implementation: str = "auto") -> Tensor:
    """Compute `gelu(a) · b` with the exact (erf) GELU, for `x` = `[a, b]` along the last axis.

    `x` is `[…, 2·hidden]`, the output of the merged input projections; the result is `[…, hidden]`
    in the dtype of `x`.
    Raises ValueError if the last axis is odd, the dtype is not floating point or the implementation
    cannot run.
    """
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected an even last axis, 2·hidden")
    check_floating(x=x)
    chosen = operator.select(implementation, x)
    return reference.gated_gelu(x) if chosen == "reference" else _run(x, chosen)


def _fwd_shapes(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _bwd_shapes(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_fwd = operator.define("fwd", "(Tensor x) -> Tensor", _fwd_shapes)
_bwd = operator.define("bwd", "(Tensor dy, Tensor x) -> Tensor", _bwd_shapes)


def _forward(ctx: Any, x: Tensor, implementation: str) -> Tensor:
    ctx.save_for_backward(x)
    ctx.implementation = implementation
    return _fwd[implementation](x)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return _bwd[ctx.implementation](dy, *ctx.saved_tensors), None


_run = differentiable(_forward, _backward)
