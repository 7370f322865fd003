"""Layer norm with time-dependent scale and shift: TD-LN (paper section 3.2)."""

from torch import Tensor

from dimr_fast import reference
from dimr_fast.ops._checks import check_time_values
from dimr_fast.ops.implementations import Implementations

implementations = Implementations("td_layer_norm")


def td_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, implementation: str = "auto"
) -> Tensor:
    """LayerNorm (eps 1e-5) over the last axis, times `weight`, plus `bias`.

    `x` is `[B, …, D]` in fp32, bf16 or fp16; `weight` and `bias` `[T, D]`, with T = B (a time per
    image) or 1. Statistics are fp32; the result has the shape and dtype of `x`.
    Raises ValueError where shapes or devices do not fit or the implementation is unusable.
    """
    check_time_values(x, weight=weight, bias=bias)
    implementations.select(implementation, x)
    return reference.td_layer_norm(x, weight, bias)
