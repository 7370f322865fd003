"""Between what is stored of an image, pixels or latents, and what the model sees."""

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class PixelScale:
    """Pixels 0..255 become zero-mean, unit-variance values: `(pixel − mean) / std`.

    The noise schedule was made for inputs of unit variance (published latents are multiplied by
    0.18215 for that), and pictures differ: satellite tiles are dark and of low contrast.
    """

    mean: float
    std: float

    @classmethod
    def of(cls, images: Tensor) -> Self:
        """The scale that standardises these images, uint8 of any shape, over all pixels."""
        pixels = images.to(torch.float32)
        return cls(round(pixels.mean().item(), 3), round(pixels.std().item(), 3))

    @property
    def range(self) -> tuple[float, float]:
        """The values of pixels 0 and 255."""
        return -self.mean / self.std, (255 - self.mean) / self.std

    def to_model(self, images: Tensor) -> Tensor:
        """uint8 pixels to fp32 values of the same shape."""
        return (images.to(torch.float32) - self.mean) / self.std

    def to_pixels(self, x: Tensor) -> Tensor:
        """Values to uint8 pixels of the same shape: rounded, then clamped."""
        return (x * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class LatentScale:
    """An autoencoder's moments become a sample of unit variance, times `factor`.

    Moments are mean and log variance of a Gaussian, as diffusers' `AutoencoderKL` gives them. The
    default is that of Stable Diffusion's autoencoder with 8 times fewer positions and 4 channels.
    """

    factor: float = 0.18215

    @property
    def range(self) -> None:
        """Latents have none."""
        return None

    def to_model(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A sample, fp32 [B, C, H, W], of moments [B, 2C, H, W], by unit Gaussian noise like it.

        Log variances are clamped to -30..20, as the autoencoder's own sampling does.
        """
        mean, log_variance = moments.to(torch.float32).chunk(2, dim=1)
        return (mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise) * self.factor

    def to_latents(self, x: Tensor) -> Tensor:
        """What the autoencoder decodes, from what the model drew; shapes [B, C, H, W]."""
        return x / self.factor


Scale = PixelScale | LatentScale

_KINDS = {"pixels": PixelScale, "latents": LatentScale}


def scale_to_dict(scale: Scale) -> dict[str, Any]:
    """The scale as plain JSON values; `scale_from_dict` reads it back."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(scale, cls))
    return {"kind": kind, **asdict(scale)}


def scale_from_dict(values: dict[str, Any]) -> Scale:
    """Build a scale from what `scale_to_dict` gave; ValueError for anything else."""
    fields = dict(values)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(_KINDS)}")
    try:
        return _KINDS[kind](**fields)
    except TypeError as error:
        raise ValueError(f"values: not a scale of {kind} ({error})") from error
