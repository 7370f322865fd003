"""Depthwise convolution of the ConvNeXt blocks."""

from torch import Tensor

from dimr_fast import reference
from dimr_fast.ops.implementations import Implementations

implementations = Implementations("depthwise_conv2d")


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, implementation: str = "auto"
) -> Tensor:
    """Convolve each channel of `x` `[B, H, W, D]` with its own odd k×k filter, zero-padded."""
    implementations.select(implementation, x)
    return reference.depthwise_conv2d(x, weight, bias)
