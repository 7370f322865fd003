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


def labels_of(names: list[str], path: Path) -> np.ndarray:
    """Return the pixels left of the images of a grid with one row for each name."""
    images = torch.zeros(len(names), 1, 3, 16, 16, dtype=torch.uint8)
    image_grid(images, names, path, scale=1)
    found = np.asarray(Image.open(path))
    return found[:, : found.shape[1] - 18]


@pytest.mark.parametrize("name", ["café", "кот", "γάτα", "cafe\u0301"])
def test_a_grid_names_classes_in_other_scripts(tmp_path: Path, name: str) -> None:
    """Pillow's own font has ASCII only, and draws boxes for the rest."""
    pytest.importorskip("matplotlib", reason="needs matplotlib (extra: demo)")
    boxes = labels_of(["\U0010fffd" * len(name)], tmp_path / "boxes.png")
    found = labels_of([name], tmp_path / "grid.png")
    assert (found < 128).any()
    assert found.shape != boxes.shape or not np.array_equal(found, boxes)
    assert not (tmp_path / "grid.txt").exists()


def test_a_grid_numbers_classes_that_no_font_has(tmp_path: Path) -> None:
    """And writes the numbers and names beside the picture."""
    names = ["cat", "\U0010fffd\U0010fffc", "dog"]
    found = labels_of(names, tmp_path / "grid.png")
    assert np.array_equal(found, labels_of(["cat", "2", "dog"], tmp_path / "numbered.png"))
    text = (tmp_path / "grid.txt").read_text(encoding="utf-8")
    assert text == f"1: cat\n2: {names[1]}\n3: dog\n"
    assert not (tmp_path / "numbered.txt").exists()


def test_a_name_with_line_breaks_takes_one_line(tmp_path: Path) -> None:
    found = labels_of(["a\n b"], tmp_path / "a.png")
    assert np.array_equal(found, labels_of(["a b"], tmp_path / "b.png"))


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
