"""Training runs in folders: images to train on, and what a run has written."""

import json
import struct
from pathlib import Path

import torch
from PIL import Image

from dimr_fast.checkpoint import load_checkpoint
from dimr_fast.training.state import CHECKPOINT


def noise_images(folder: Path) -> Path:
    """Write two classes of ten images of noise, 16×16 pixels, below `folder`; return it."""
    generator = torch.Generator().manual_seed(0)
    for name in ("dark", "light"):
        (folder / name).mkdir()
        for number in range(10):
            pixels = torch.randint(0, 128, (16, 16, 3), generator=generator, dtype=torch.uint8)
            pixels += 127 * (name == "light")
            Image.fromarray(pixels.numpy()).save(folder / name / f"{number}.png")
    return folder


def reached(checkpoint: Path) -> int:
    """Read the step from the header of a checkpoint, which may be replaced at any moment."""
    try:
        with checkpoint.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            return int(json.loads(file.read(size))["__metadata__"]["step"])
    except FileNotFoundError:
        return -1


def contents(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / CHECKPOINT)[0]
