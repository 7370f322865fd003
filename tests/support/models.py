"""What tests of saved models share."""

from pathlib import Path

import torch
from torch import Tensor

from dimr_fast import DiMR
from dimr_fast.checkpoint import TrainedModel, save_checkpoint
from dimr_fast.data.scaling import LatentScale, PixelScale, scale_to_dict


def randomised(model: DiMR) -> DiMR:
    """Every parameter away from its initial value, so that all of them matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs() -> dict[str, Tensor]:
    """Two images, times and classes for the `tiny` preset."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 16, 16, generator=generator)
    return {"x": x, "log_snr": torch.tensor([-3.0, 2.0]), "y": torch.tensor([1, 6])}


class Doubling:
    """Stands in for an autoencoder: each latent becomes 2×2 pixels, three of its channels RGB."""

    downsampling, channels, scale = 2, 3, LatentScale()

    @classmethod
    def load(cls, name: str, device: torch.device) -> "Doubling":
        assert (name, device.type) == ("the autoencoder", "cpu")
        return cls()

    def decode(self, latents: Tensor) -> Tensor:
        pixels = (latents[:, :3] * 20 + 128).round().clamp(0, 255).to(torch.uint8)
        return pixels.repeat_interleave(2, -1).repeat_interleave(2, -2)


def write_checkpoint(trained: TrainedModel, path: Path) -> Path:
    """A training checkpoint as far as `load_model` looks at it."""
    tensors = {f"ema.{name}": value for name, value in trained.model.state_dict().items()}
    metadata = {
        "config": trained.model.config.to_dict(),
        "classes": trained.classes,
        "scale": scale_to_dict(trained.scale),
    }
    save_checkpoint(path, tensors, metadata)
    return path


def trained_model() -> TrainedModel:
    """A tiny model of pixels and six classes."""
    torch.manual_seed(0)
    model = DiMR.from_preset("tiny")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return TrainedModel(model.eval(), tuple("abcdef"), PixelScale(100.0, 50.0))
