"""What tests of images to be scored share."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def drawn(count: int, seed: int = 0, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, size, size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def write_folder(images: Tensor, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:04}.png")
    return folder


def write_npz(images: Tensor, path: Path, **others: Any) -> Path:
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **others)
    return path


def read(images: Any) -> Tensor:
    return torch.cat(list(images.batches(7)))
