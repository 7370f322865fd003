"""Root-mean-square norm with a time-dependent scale (paper section 3.2)."""

from torch import Tensor

from dimr_fast import reference
from dimr_fast.ops._checks import check_time_values
from dimr_fast.ops.implementations import Implementations

implementations = Implementations("td_rms_norm")


def td_rms_norm(x: Tensor, scale: Tensor, *, implementation: str = "auto") -> Tensor:
    """`x / (rms(x) + 1e-8) · scale` over the last axis.

    `x` is `[B, …, D]` in fp32, bf16 or fp16; `scale` `[T, D]`, with T = B (a time per image) or 1.
    Statistics are fp32; the result has the shape and dtype of `x`.
    Raises ValueError where shapes or devices do not fit or the implementation is unusable.
    """
    check_time_values(x, scale=scale)
    implementations.select(implementation, x)
    return reference.td_rms_norm(x, scale)
