"""The operators: one file each, every one registered in `implementations.OPERATORS`."""

from dimr_fast.ops.depthwise_conv2d import depthwise_conv2d

__all__ = ["depthwise_conv2d"]
