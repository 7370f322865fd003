"""Real images to compare with, and a cache of what was computed of them."""

import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from dimr_fast.data.image_sets import (
    StoredImages,
    TensorImages,
    counts_in_words,
    npz_names,
    open_images,
    read_arrays,
)
from dimr_fast.data.tiles import load_tiles
from dimr_fast.features import FeatureNetwork, InceptionFeatures, file_hash
from dimr_fast.files import claim, write_tensors
from dimr_fast.metrics import covariance_factor
from dimr_fast.summaries import KEPT, FeatureSummary, summarize

FORMAT = 1
"""Raised whenever an entry of the cache would be computed or stored differently."""
TILES = "tiles"
"""The reference that is not a path."""


@dataclass(frozen=True)
class Reference:
    """Real images, or the statistics of their Inception features that a file holds, or both."""

    images: StoredImages | None
    statistics: Path | None

    @classmethod
    def open(cls, text: str, size: tuple[int, int]) -> "Reference":
        """Tiles are cut to `size`, that of the images to score."""
        if text == TILES:
            if size[0] != size[1]:
                raise ValueError(f"reference: got tiles for {size} images, expected square ones")
            tiles = load_tiles(size[0])
            counts = counts_in_words(tiles.val_labels.bincount().tolist())
            return cls(TensorImages(tiles.val_images, "satellite tiles, validation", counts), None)
        path = Path(text)
        names = npz_names(path) if path.suffix == ".npz" and path.is_file() else ()
        statistics = path if {"mu", "sigma"} <= set(names) else None
        if statistics is not None and "arr_0" not in names:
            return cls(None, statistics)
        try:
            return cls(open_images(path), statistics)
        except ValueError as error:
            raise ValueError(f"reference: {error}") from error

    def check(self, network: FeatureNetwork) -> None:
        """ValueError where there is nothing that features of this network compare with."""
        if self.statistics is None:
            return
        if not isinstance(network, InceptionFeatures):
            if self.images is None:
                raise ValueError(
                    f"reference: got Inception statistics without images in {self.statistics}, "
                    f"expected images or --inception-weights"
                )
            return
        found = read_arrays(self.statistics, "mu", "sigma")
        if found["mu"].shape != (2048,) or found["sigma"].shape != (2048, 2048):
            raise ValueError(
                f"reference: got mu {found['mu'].shape} and sigma {found['sigma'].shape} in "
                f"{self.statistics}, expected (2048,) and (2048, 2048)"
            )
        if not all(np.isfinite(array).all() for array in found.values()):
            raise ValueError(f"reference: got mu or sigma in {self.statistics} that is not finite")

    @property
    def fingerprint(self) -> str:
        """Text that other images or statistics do not have."""
        if self.images is not None:
            return self.images.fingerprint
        assert self.statistics is not None
        return f"npz {file_hash(self.statistics)}"

    def uses_statistics(self, network: FeatureNetwork) -> bool:
        """Whether the file's mean and covariance take the place of those of its images."""
        return self.statistics is not None and isinstance(network, InceptionFeatures)

    def summary(self, network: FeatureNetwork, cache: Path) -> FeatureSummary:
        """Of its images, from the folder `cache` where it is there; with a progress bar."""
        if self.images is None:
            found = FeatureSummary(torch.empty(0), torch.empty(0), torch.empty(0, 2048))
        else:
            with tqdm(total=self.images.count, unit="image", desc="reference") as bar:
                found = reference_summary(network, self.images, cache, bar.update)
                bar.update(self.images.count - bar.n)
        if self.statistics is None or not self.uses_statistics(network):
            return found
        arrays = read_arrays(self.statistics, "mu", "sigma")
        mean, covariance = (torch.from_numpy(arrays[n]).double() for n in ("mu", "sigma"))
        return dataclasses.replace(found, mean=mean, factor=covariance_factor(covariance))


def reference_summary(
    network: FeatureNetwork,
    images: StoredImages,
    cache: Path,
    progress: Callable[[int], object] | None = None,
) -> FeatureSummary:
    """`summarize`, or what it gave before for the same images and network.

    `cache` is a folder, such as `user_cache()`. An entry that is damaged, or of anything else, is
    computed anew. Raises OSError where it cannot be written.
    """
    key = json.dumps(
        {
            "format": FORMAT,
            "images": images.fingerprint,
            "network": [network.name, network.input_size, network.resize, network.weights_hash],
            "kept": KEPT,
        },
        sort_keys=True,
    )
    claim(cache, ())
    path = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    found = _read(path, key)
    if found is not None:
        return found
    summary = summarize(network, images, progress)
    tensors = _tensors(summary)
    write_tensors(path, tensors, {"key": key, "hash": _hash(tensors)})
    return summary


def user_cache() -> Path:
    """The folder for references where none is set: the user's own, by the platform's custom."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "dimr_fast"
    if sys.platform == "win32" and (base := os.environ.get("LOCALAPPDATA")):
        return Path(base) / "dimr_fast" / "cache"
    caches = ("Library", "Caches") if sys.platform == "darwin" else (".cache",)
    return Path.home().joinpath(*caches, "dimr_fast")


def _read(path: Path, key: str) -> FeatureSummary | None:
    """The entry at `path`, or None unless it is whole and of this key."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    if metadata.get("key") != key or metadata.get("hash") != _hash(tensors):
        return None
    return FeatureSummary(**tensors, cached=True)


def _tensors(summary: FeatureSummary) -> dict[str, Tensor]:
    return {
        "mean": summary.mean.contiguous(),
        "factor": summary.factor.contiguous(),
        "features": summary.features.contiguous(),
    }


def _hash(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if math.prod(tensor.shape):
            found.update(tensor.numpy().data)
    return found.hexdigest()
