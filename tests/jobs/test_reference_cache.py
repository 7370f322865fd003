"""The cache of feature statistics of real images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dimr_fast.evaluation import frechet_to_reference
from dimr_fast.evaluation.image_sets import FolderImages, TensorImages
from dimr_fast.evaluation.real_images import cached_statistics
from dimr_fast.utils.files import user_cache
from tests.support.evaluation import Colours
from tests.support.files import file_size_limit
from tests.support.image_files import random_images, read_all, write_folder


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return write_folder(random_images(20, seed=1), tmp_path / "real")


def test_a_reference_is_computed_once(tmp_path: Path, reference: Path) -> None:
    network: Any = Colours()
    images, cache = FolderImages(reference), tmp_path / "cache"
    first = cached_statistics(network, images, cache)
    calls = network.calls
    second = cached_statistics(network, FolderImages(reference), cache)
    assert (first.cached, second.cached, network.calls) == (False, True, calls)
    for name in ("mean", "factor", "features"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.features.shape == (20, 6)
    assert frechet_to_reference(network, read_all(images), second) < 1e-9

    other: Any = Colours()
    other.weights_hash = "1"
    assert not cached_statistics(other, images, cache).cached
    assert len(list(cache.iterdir())) == 2


class Projections(Colours):
    """A feature network of many features: random projections of the pixels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.float().flatten(1)
        generator = torch.Generator().manual_seed(0)
        return pixels @ torch.randn(pixels.shape[1], 640, generator=generator)


@pytest.mark.parametrize("count", [20, 700])
def test_a_distance_to_a_cached_reference_is_the_same_to_the_last_bit(
    tmp_path: Path, count: int
) -> None:
    """In memory of another layout, the sums of the distance would have another order."""
    network: Any = Projections()
    for seed in range(4):
        real = TensorImages(random_images(count, seed=10 + seed), f"real {seed}")
        first, second = (cached_statistics(network, real, tmp_path / "cache") for _ in range(2))
        assert (first.cached, second.cached) == (False, True)
        drawn = random_images(12, seed=seed)
        distances = [frechet_to_reference(network, drawn, found) for found in (first, second)]
        assert distances[0] == distances[1] > 0


def test_a_cache_that_may_only_be_read_is_read(tmp_path: Path, reference: Path) -> None:
    """Such as that of an administrator."""
    network: Any = Colours()
    images, cache = FolderImages(reference), tmp_path / "cache"
    cached_statistics(network, images, cache)
    cache.chmod(0o555)
    with file_size_limit(0):  # root may write everywhere
        assert cached_statistics(network, images, cache).cached


def damaged(path: Path) -> Iterator[None]:
    """Damage an entry of the cache in one way after the other."""
    whole, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(whole[: len(whole) // 2])
    yield
    flipped = bytearray(whole)
    flipped[-5] ^= 64
    path.write_bytes(flipped)
    yield
    path.write_text("something else")
    yield
    save_file(tensors, path, metadata={"key": "foreign", "hash": "0"})
    yield


def test_a_damaged_or_foreign_entry_is_computed_anew(tmp_path: Path) -> None:
    network: Any = Colours()
    images, cache = TensorImages(random_images(12), ""), tmp_path / "cache"
    first = cached_statistics(network, images, cache)
    (entry,) = cache.iterdir()
    damages = 0
    for _ in damaged(entry):
        damages += 1
        again = cached_statistics(network, images, cache)
        assert not again.cached
        assert torch.equal(again.factor, first.factor)
        assert cached_statistics(network, images, cache).cached
    assert damages == 4
    assert list(cache.iterdir()) == [entry]


def test_the_cache_is_in_the_users_cache_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "dimr_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache().is_relative_to(tmp_path)
    assert user_cache().name == "dimr_fast"
