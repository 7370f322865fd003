"""A small autoencoder of diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch


def save_autoencoder(folder: Path, *, blocks: int = 4, **settings: Any) -> Path:
    """Write a randomly initialised AutoencoderKL and return its folder.

    It has 0.1M weights at most and 4 channels; latents have 2^(blocks − 1) times fewer rows and
    columns than images.
    """
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: hub)")
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "block_out_channels": (8, 16, 16, 16)[:blocks],
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    diffusers.AutoencoderKL(**(values | settings)).save_pretrained(folder)
    return folder
