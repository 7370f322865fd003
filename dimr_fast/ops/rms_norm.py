"""Root-mean-square norm with a plain learned scale."""

from typing import overload

from torch import Tensor

from dimr_fast.ops import _compiled, _triton
from dimr_fast.ops._checks import check_width
from dimr_fast.ops.implementations import Implementations
from dimr_fast.ops.td_rms_norm import td_rms_norm

implementations = Implementations(
    "rms_norm",
    example=(4, 257, 960),
    triton=_triton.why_not,
    cpu=_compiled.why_not_cpu,
    slower={"triton": _triton.slower},
)


@overload
def rms_norm(
    x: Tensor, scale: Tensor, residual: None = None, *, implementation: str = "auto"
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, scale: Tensor, residual: Tensor, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, scale: Tensor, residual: Tensor | None = None, *, implementation: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """`td_rms_norm` with a `scale` `[D]` that no time enters.

    `x`, and `residual` where given, are `[B, …, D]` in fp32, bf16 or fp16. Statistics are fp32; the
    result has the shape of `x` and its dtype or, under autocast, autocast's. With a residual the
    result is `(residual + x, its norm)`.
    Raises ValueError where shapes or devices do not fit or the implementation is unusable.
    """
    if scale.dim() != 1:
        raise ValueError(f"scale: got shape {tuple(scale.shape)}, expected [D]")
    check_width(x, scale, "scale")
    chosen = implementations.select(implementation, x)
    # One scale for all images is one time for all: the same kernel.
    return td_rms_norm(x, scale[None], residual, implementation=chosen)
