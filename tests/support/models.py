"""Small models whose parameters all matter, and files that hold them."""

from pathlib import Path

import torch
from torch import Tensor

from dimr_fast import DiMR
from dimr_fast.checkpoint import TrainedModel, save_checkpoint
from dimr_fast.data.scaling import PixelScale, scale_to_dict


def randomised(model: DiMR, size: float = 0.1) -> DiMR:
    """Add noise of standard deviation `size` to every parameter; return the model for inference.

    Many parameters are initialised to 0 or 1, where mistakes would not show.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs() -> dict[str, Tensor]:
    """Return two images, times and classes for the `tiny` preset."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 16, 16, generator=generator)
    return {"x": x, "log_snr": torch.tensor([-3.0, 2.0]), "y": torch.tensor([1, 6])}


def inputs_of(model: DiMR, batch: int, times: int | None = None) -> dict[str, Tensor]:
    """Return images, times from -3 to 4 (`times` of them, else one an image) and classes."""
    generator = torch.Generator().manual_seed(batch)
    config = model.config
    return {
        "x": torch.randn(batch, config.channels, *config.image_size, generator=generator),
        "log_snr": torch.linspace(-3, 4, batch if times is None else times),
        "y": torch.arange(batch) % config.num_classes,
    }


def trained_model() -> TrainedModel:
    """Return a tiny model of 16×16 pixels in the six classes a to f."""
    torch.manual_seed(0)
    model = randomised(DiMR.from_preset("tiny"), 0.05)
    return TrainedModel(model, tuple("abcdef"), PixelScale(100.0, 50.0))


def write_checkpoint(trained: TrainedModel, path: Path) -> Path:
    """Write as much of a training checkpoint as `load_model` reads; return its path."""
    tensors = {f"ema.{name}": value for name, value in trained.model.state_dict().items()}
    metadata = {
        "config": trained.model.config.to_dict(),
        "classes": trained.classes,
        "scale": scale_to_dict(trained.scale),
    }
    save_checkpoint(path, tensors, metadata)
    return path
