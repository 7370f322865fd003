"""Between pixels and what the model sees."""

from dataclasses import dataclass
from typing import Self

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
