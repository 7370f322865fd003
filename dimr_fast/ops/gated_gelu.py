"""The gate of the gated MLP (paper section 3.3)."""

from torch import Tensor

from dimr_fast import reference
from dimr_fast.ops.implementations import Implementations

implementations = Implementations("gated_gelu")


def gated_gelu(x: Tensor, *, implementation: str = "auto") -> Tensor:
    """`gelu(a) · b` with the exact (erf) GELU, for `a ‖ b` side by side in the last axis.

    `x` is `[…, 2·hidden]`, the merged projection; the result `[…, hidden]` in the dtype of `x`.
    Raises ValueError where the last axis is odd or the implementation is unusable.
    """
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected an even last axis, 2·hidden")
    implementations.select(implementation, x)
    return reference.gated_gelu(x)
