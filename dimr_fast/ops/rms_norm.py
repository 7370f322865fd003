"""Root-mean-square norm with a learned scale that does not depend on time."""

from collections.abc import Sequence
from typing import overload

from torch import Tensor

from dimr_fast.ops._checks import check_width
from dimr_fast.ops._compiled import CPU
from dimr_fast.ops._triton import TRITON
from dimr_fast.ops.registration import Operator
from dimr_fast.ops.td_rms_norm import td_rms_norm

operator = Operator("rms_norm", TRITON, CPU, example=(4, 257, 960))


@overload
def rms_norm(
    x: Tensor,
    scale: Tensor,
    residual: None = None,
    weights: Sequence[Tensor] = (),
    biases: Sequence[Tensor] = (),
    *,
    implementation: str = "auto",
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    scale: Tensor,
    residual: Tensor,
    weights: Sequence[Tensor] = (),
    biases: Sequence[Tensor] = (),
    *,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    scale: Tensor,
    residual: Tensor | None = None,
    weights: Sequence[Tensor] = (),
    biases: Sequence[Tensor] = (),
    *,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `td_rms_norm` with one `scale` `[D]` for all times.

    `x` and `residual` (optional) are `[B, …, D]` in fp32, bf16 or fp16. Statistics are fp32; the
    result has the shape of `x` and its dtype; under autocast, the autocast dtype. With a residual
    the result is `(s, normed s)`, where `s = residual + x`. `weights` and `biases` are as in
    `td_rms_norm`. Raises ValueError if shapes or devices do not fit or the implementation cannot
    run.
    """
    if scale.dim() != 1:
        raise ValueError(f"scale: got shape {tuple(scale.shape)}, expected [D]")
    check_width(x, scale, "scale")
    operator.select(implementation, x)  # an error has the name of this operator
    # One scale for all images is the case T = 1 of the time-dependent norm.
    return td_rms_norm(x, scale[None], residual, weights, biases, implementation=implementation)
