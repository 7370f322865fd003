"""Root-mean-square norm with a plain learned scale."""

from torch import Tensor

from dimr_fast import reference
from dimr_fast.ops._checks import check_width
from dimr_fast.ops.implementations import Implementations

implementations = Implementations("rms_norm")


def rms_norm(x: Tensor, scale: Tensor, *, implementation: str = "auto") -> Tensor:
    """`x / (rms(x) + 1e-8) · scale` over the last axis.

    `x` is `[B, …, D]` in fp32, bf16 or fp16; `scale` `[D]`. Statistics are fp32; the result has the
    shape and dtype of `x`.
    Raises ValueError where shapes or devices do not fit or the implementation is unusable.
    """
    if scale.dim() != 1:
        raise ValueError(f"scale: got shape {tuple(scale.shape)}, expected [D]")
    check_width(x, scale, "scale")
    implementations.select(implementation, x)
    return reference.rms_norm(x, scale)
