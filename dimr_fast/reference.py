"""What every operator means, in plain PyTorch: the specification that tests compare with."""

import torch
import torch.nn.functional as F


def depthwise_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Convolve each channel with its own odd k×k kernel, zero padding, same size.

    x [B, H, W, D], weight [D, 1, k, k], bias [D] or None; returns [B, H, W, D]. SPEC section 2.
    """
    y = F.conv2d(
        x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0]
    )
    return y.permute(0, 2, 3, 1)
