"""The gate of the gated MLP (paper section 3.3)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dimr_fast import reference
from dimr_fast.ops import _compiled, _triton
from dimr_fast.ops._checks import check_floating
from dimr_fast.ops.implementations import Implementations

implementations = Implementations(
    "gated_gelu",
    example=(4, 257, 3840),
    triton=_triton.why_not,
    cpu=_compiled.why_not_cpu,
    slower={"triton": _triton.slower},
)


def gated_gelu(x: Tensor, *, implementation: str = "auto") -> Tensor:
    """`gelu(a) · b` with the exact (erf) GELU, for `a ‖ b` side by side in the last axis.

    `x` is `[…, 2·hidden]`, the merged projection; the result `[…, hidden]` in the dtype of `x`.
    Raises ValueError where the last axis is odd, the dtype not floating point or the implementation
    unusable.
    """
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected an even last axis, 2·hidden")
    check_floating(x=x)
    chosen = implementations.select(implementation, x)
    return reference.gated_gelu(x) if chosen == "reference" else _GatedGELU.apply(x, chosen)


def _fwd_shapes(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _bwd_shapes(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_FWD = "gated_gelu", "fwd", "(Tensor x) -> Tensor", _fwd_shapes
_BWD = "gated_gelu", "bwd", "(Tensor dy, Tensor x) -> Tensor", _bwd_shapes
_fwd = {"triton": _triton.register(*_FWD), "cpu": _compiled.declare(*_FWD)}
_bwd = {"triton": _triton.register(*_BWD), "cpu": _compiled.declare(*_BWD)}


class _GatedGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, implementation: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.implementation = implementation
        return _fwd[implementation](x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _bwd[ctx.implementation](dy, *ctx.saved_tensors), None
