"""The gate of the gated MLP (paper section 3.3)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dimr_fast import reference
from dimr_fast.ops import _triton
from dimr_fast.ops._checks import check_floating
from dimr_fast.ops.implementations import Implementations

implementations = Implementations(
    "gated_gelu",
    example=(4, 257, 3840),
    triton=_triton.why_not,
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
    if implementations.select(implementation, x) == "triton":
        return _GatedGELU.apply(x)
    return reference.gated_gelu(x)


_fwd = _triton.register(
    "gated_gelu",
    "fwd",
    "(Tensor x) -> Tensor",
    lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
)
_bwd = _triton.register(
    "gated_gelu",
    "bwd",
    "(Tensor dy, Tensor x) -> Tensor",
    lambda dy, x: x.new_empty(x.shape),
)


class _GatedGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _fwd(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return _bwd(dy, *ctx.saved_tensors)
