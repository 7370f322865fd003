"""Random images and the files that hold them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def random_images(count: int, seed: int = 0, size: int = 16) -> Tensor:
    """Return noise, uint8 [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, size, size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def write_folder(images: Tensor, folder: Path) -> Path:
    """Write images uint8 [N, 3, h, w] as PNGs into a new folder, and return it."""
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:04}.png")
    return folder


def write_npz(images: Tensor, path: Path, **others: Any) -> Path:
    """Write images uint8 [N, 3, h, w] and other arrays as the ADM evaluation suite reads them."""
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **others)
    return path


def read_all(images: Any) -> Tensor:
    """Return all images of an image set, read in batches of 7."""
    return torch.cat(list(images.batches(7)))


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Return noise, uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    """Write an image file and the folders above it; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path
