"""Grids of images and loss curves as files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dimr_fast.utils.plots import image_grid, loss_curve
from tests.support.files import file_size_limit


def test_grid_repeats_the_pixels_of_each_image(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 3, 4, 5), dtype=torch.uint8)
    image_grid(images, ["ice", "desert"], tmp_path / "grid.png", scale=2)
    found = np.asarray(Image.open(tmp_path / "grid.png"))
    left = found.shape[1] - 3 * (5 * 2 + 2)
    assert left > 10
    assert (found[:, :left] < 128).any(), "no names drawn"
    for row in range(2):
        for column in range(3):
            top, start = row * 10, left + column * 12
            cell = found[top : top + 8 : 2, start : start + 10 : 2]
            assert np.array_equal(cell, images[row, column].permute(1, 2, 0))


def test_grid_refuses_other_images(tmp_path: Path) -> None:
    images = torch.zeros(1, 2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"images: got torch\.float32"):
        image_grid(images, ["a"], tmp_path / "grid.png")
    with pytest.raises(ValueError, match="row_names: got 2"):
        image_grid(images.byte(), ["a", "b"], tmp_path / "grid.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("losses", [[1.0], [3.0, -1.0], [1 / (i + 1) for i in range(200)]])
def test_loss_curve(tmp_path: Path, losses: list[float]) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib (extra: demo)")
    loss_curve(losses, tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size == (700, 400)
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]


def test_a_full_disk_keeps_the_previous_picture(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")
    noise = torch.randint(0, 256, (1, 1, 3, 64, 64), dtype=torch.uint8)
    with file_size_limit(5000), pytest.raises(OSError, match=r"grid\.png"):
        image_grid(noise, ["a"], path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]


def test_loss_curve_needs_losses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="losses: got none"):
        loss_curve([], tmp_path / "loss.png")
