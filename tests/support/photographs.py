"""Real images and a small autoencoder for tests, without a network."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch


def photographs() -> list[Path]:
    """The 20 ImageNet photographs inside the foolbox package, which is not imported."""
    spec = importlib.util.find_spec("foolbox")
    if spec is None or spec.origin is None:
        pytest.skip("needs the photographs in the foolbox package (extra: test)")
    found = sorted((Path(spec.origin).parent / "data").glob("imagenet_*.jpg"))
    assert len(found) == 20
    return found


def copy_photographs(folder: Path, classes: dict[str, int]) -> None:
    """Copy as many photographs into each class's folder."""
    files = iter(photographs())
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for _ in range(count):
            shutil.copy(next(files), folder / name)


def save_autoencoder(folder: Path, **settings: Any) -> None:
    """A randomly initialised AutoencoderKL: 4 channels, 8 times fewer positions, 0.1M weights."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: hub)")
    torch.manual_seed(0)
    autoencoder = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        latent_channels=4,
        norm_num_groups=4,
        **settings,
    )
    autoencoder.save_pretrained(folder)
