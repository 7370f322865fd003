"""Scaling between stored images (pixels or latents) and the model's inputs."""

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class PixelScale:
    """Scale pixels 0..255 to zero mean and unit variance: `(pixel − mean) / std`.

    The noise schedule assumes inputs of unit variance (published latents are multiplied by 0.18215
    for that), and data sets differ: satellite tiles are dark and of low contrast.
    """

    mean: float
    std: float

    @classmethod
    def of(cls, images: Tensor) -> Self:
        """Return the scale that standardises these images, uint8 of any shape, over all pixels."""
        pixels = images.to(torch.float32)
        return cls(round(pixels.mean().item(), 3), round(pixels.std().item(), 3))

    @property
    def range(self) -> tuple[float, float]:
        """Scaled values of pixels 0 and 255."""
        return -self.mean / self.std, (255 - self.mean) / self.std

    def to_model(self, images: Tensor) -> Tensor:
        """Convert uint8 pixels to fp32 values of the same shape."""
        return (images.to(torch.float32) - self.mean) / self.std

    def to_pixels(self, x: Tensor) -> Tensor:
        """Convert values to uint8 pixels of the same shape: rounded, then clamped."""
        return (x * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)


PUBLISHED_PIXELS = PixelScale(127.5, 127.5)
"""The scale of published pixel models, −1..1."""


@dataclass(frozen=True)
class LatentScale:
    """Sample latents from an autoencoder's moments and multiply them by `factor`, to unit variance.

    Moments are mean and log variance of a Gaussian, as diffusers' `AutoencoderKL` returns them. The
    default is the factor of Stable Diffusion's autoencoder (downsampling 8, 4 channels).
    """

    factor: float = 0.18215

    @property
    def range(self) -> None:
        """None: latents are unbounded."""
        return None

    def to_model(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Sample fp32 [B, C, H, W] from moments [B, 2C, H, W] and unit Gaussian noise.

        Log variances are clamped to -30..20, as in the autoencoder's own sampling.
        """
        mean, log_variance = moments.to(torch.float32).chunk(2, dim=1)
        return (mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise) * self.factor

    def to_latents(self, x: Tensor) -> Tensor:
        """Convert the model's outputs [B, C, H, W] to latents for the autoencoder's decoder."""
        return x / self.factor


Scale = PixelScale | LatentScale

_KINDS = {"pixels": PixelScale, "latents": LatentScale}


def scale_to_dict(scale: Scale) -> dict[str, Any]:
    """Return the scale as plain JSON values, for `scale_from_dict`."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(scale, cls))
    return {"kind": kind, **asdict(scale)}


def scale_from_dict(values: dict[str, Any]) -> Scale:
    """Build a scale from the result of `scale_to_dict`. Raises ValueError for anything else."""
    fields = dict(values)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(_KINDS)}")
    try:
        return _KINDS[kind](**fields)
    except TypeError as error:
        raise ValueError(f"values: not a scale of {kind} ({error})") from error
