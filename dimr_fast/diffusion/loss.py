"""The training objective: noise prediction at every resolution of the model."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dimr_fast.utils.validation import check_tensors

_DEFAULT_COEFFICIENTS = {1: (1.0,), 2: (0.25, 1.0), 3: (0.25, 0.5, 1.0)}


def pool_noise(noise: Tensor, factor: int) -> Tensor:
    """Pool white noise to a `factor` times lower resolution: sums over boxes, divided by `factor`.

    A box has `factor²` independent values, so its sum divided by `factor` has unit variance (its
    mean would not).

    `noise`: [B, C, H, W] with H and W divisible by `factor` ≥ 1. Returns [B, C, H/factor,
    W/factor]. Raises ValueError otherwise.
    """
    _check_noise(noise)
    height, width = noise.shape[2:]
    if factor < 1 or height % factor or width % factor:
        raise ValueError(
            f"factor: got {factor}, expected a positive divisor of the noise's {height}×{width}"
        )
    return noise if factor == 1 else F.avg_pool2d(noise, factor) * factor


def multi_scale_loss(
    predictions: Sequence[Tensor], noise: Tensor, coefficients: Sequence[float] | None = None
) -> Tensor:
    """Compute `Σ_r c_r · mean((ε̂_r − ε_r)²)` per image; `ε_r` is the noise pooled to resolution r.

    `predictions`: [B, C, h, w] each, from low to high resolution, as the model returns them; the
    noise's height and width are the same multiple of h and w. `noise`: [B, C, H, W].
    `coefficients`: one per prediction; by default (1,), (1/4, 1) or (1/4, 1/2, 1) for one, two or
    three. Returns [B], computed in float32 or, for float64 noise, float64.

    Raises ValueError for other shapes and for coefficients of the wrong number or not finite.

    Source: Liu et al. 2024, arXiv 2406.09416.
    """
    if len(predictions) == 0:
        raise ValueError("predictions: got none, expected at least one [B, C, h, w]")
    if coefficients is None:
        if len(predictions) not in _DEFAULT_COEFFICIENTS:
            raise ValueError(
                f"coefficients: got None for {len(predictions)} predictions, expected one number "
                "each (there is a default for one, two or three)"
            )
        coefficients = _DEFAULT_COEFFICIENTS[len(predictions)]
    if len(coefficients) != len(predictions) or not all(map(math.isfinite, coefficients)):
        raise ValueError(
            f"coefficients: got {tuple(coefficients)}, expected {len(predictions)} finite numbers, "
            "one per prediction"
        )
    _check_noise(noise)
    noise = noise.to(torch.promote_types(noise.dtype, torch.float32))
    total = noise.new_zeros(noise.shape[0])
    for index, (prediction, coefficient) in enumerate(zip(predictions, coefficients, strict=True)):
        target = pool_noise(noise, _pooling_factor(index, prediction, noise))
        error = (prediction.to(noise.dtype) - target).square().mean(dim=(1, 2, 3))
        total = total + coefficient * error
    return total


def _check_noise(noise: Tensor) -> None:
    check_tensors(noise=noise)
    if noise.ndim != 4 or not noise.is_floating_point():
        raise ValueError(
            f"noise: got {noise.dtype} {tuple(noise.shape)}, expected floating point [B, C, H, W]"
        )


def _pooling_factor(index: int, prediction: Tensor, noise: Tensor) -> int:
    """Return the ratio of the noise's size to a prediction's, the same for height and width."""
    check_tensors(**{f"predictions[{index}]": prediction})
    if prediction.shape[:2] == noise.shape[:2] and prediction.ndim == 4:
        height, width = prediction.shape[2:]
        factor = noise.shape[2] // max(height, 1)
        if factor >= 1 and noise.shape[2:] == (height * factor, width * factor):
            return factor
    raise ValueError(
        f"predictions[{index}]: got shape {tuple(prediction.shape)}, expected "
        f"({noise.shape[0]}, {noise.shape[1]}, {noise.shape[2]}/q, {noise.shape[3]}/q) "
        "for a whole number q"
    )
