"""Pipelines of diffusers from small models."""

from pathlib import Path
from typing import Any

import torch

from dimr_fast import DiMR
from dimr_fast.checkpoint import TrainedModel
from dimr_fast.data.scaling import PUBLISHED_PIXELS, LatentScale
from dimr_fast.utils.seeds import derived_seed
from tests.support.autoencoder import save_autoencoder
from tests.support.models import randomised, trained_model

CLASSES = tuple("abcdef")
LABELS = [0, 5, 2]


def generators(count: int = len(LABELS), seed: int = 0) -> list[torch.Generator]:
    """Return generators that draw the start noise of `ImageSampler` for the images 0, 1, …"""
    return [torch.Generator().manual_seed(derived_seed(seed, i)) for i in range(count)]


def tiny(channels: int = 3, **facts: Any) -> TrainedModel:
    """Return a tiny model of 16×16 inputs; three channels are pixels, four are latents."""
    if channels == 3:
        values: dict[str, Any] = {"scale": trained_model().scale}
    else:
        values = {"scale": LatentScale()}
    torch.manual_seed(0)
    model = randomised(DiMR.from_preset("tiny", channels=channels), 0.05)
    return TrainedModel(model, CLASSES, **(values | facts))


def published_pixels() -> TrainedModel:
    """Return a tiny model with the noise schedule and the scale of published pixel models."""
    return tiny(scale=PUBLISHED_PIXELS, schedule="vp-sde")


def autoencoder(folder: Path, **settings: Any) -> Any:
    """Return a small AutoencoderKL with the scale of Stable Diffusion's."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(save_autoencoder(folder, **settings))
