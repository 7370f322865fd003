"""Real images to score against, and a cache of their feature statistics."""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dimr_fast.data.tiles import load_tiles
from dimr_fast.errors import CheckpointError
from dimr_fast.evaluation.features import FeatureNetwork, InceptionFeatures
from dimr_fast.evaluation.image_sets import (
    StoredImages,
    TensorImages,
    counts_in_words,
    npz_names,
    open_images,
    read_arrays,
)
from dimr_fast.evaluation.metrics import covariance_factor
from dimr_fast.evaluation.statistics import MAX_FEATURES, FeatureStatistics, compute_statistics
from dimr_fast.utils.files import file_sha256
from dimr_fast.utils.tensors import read_tensors, sha256_of_named, write_tensors

CACHE_VERSION = 1
"""Increased when the content of a cache entry is computed or stored differently."""
TILES = "tiles"
"""Name of the demo's validation tiles, the only reference that is not a path."""


@dataclass(frozen=True)
class Reference:
    """Real images, or an .npz file with the statistics of their Inception features, or both."""

    images: StoredImages | None
    statistics_file: Path | None

    @classmethod
    def open(cls, text: str, size: tuple[int, int]) -> "Reference":
        """Open a folder, an .npz file or "tiles".

        `size`: (height, width) of the images to score; tiles are cropped to it. Raises ValueError
        for an unusable reference.
        """
        if text == TILES:
            if size[0] != size[1]:
                raise ValueError(f"reference: got tiles for {size} images, expected square ones")
            tiles = load_tiles(size[0])
            counts = counts_in_words(tiles.val_labels.bincount().tolist())
            return cls(TensorImages(tiles.val_images, "satellite tiles, validation", counts), None)
        path = Path(os.path.expanduser(text))
        names = npz_names(path) if path.suffix == ".npz" and path.is_file() else ()
        statistics_file = path if {"mu", "sigma"} <= set(names) else None
        if statistics_file is not None and "arr_0" not in names:
            return cls(None, statistics_file)
        try:
            return cls(open_images(path), statistics_file)
        except ValueError as error:
            raise ValueError(f"reference: {error}") from error

    def check(self, network: FeatureNetwork) -> None:
        """Raise ValueError where the reference does not fit this network's features."""
        if self.statistics_file is None:
            return
        if not isinstance(network, InceptionFeatures):
            if self.images is None:
                raise ValueError(
                    f"reference: got Inception statistics without images in "
                    f"{self.statistics_file}, expected images or --inception-weights"
                )
            return
        found = read_arrays(self.statistics_file, "mu", "sigma")
        if found["mu"].shape != (2048,) or found["sigma"].shape != (2048, 2048):
            raise ValueError(
                f"reference: got mu {found['mu'].shape} and sigma {found['sigma'].shape} in "
                f"{self.statistics_file}, expected (2048,) and (2048, 2048)"
            )
        if not all(np.isfinite(array).all() for array in found.values()):
            raise ValueError(
                f"reference: got mu or sigma in {self.statistics_file} that is not finite"
            )

    @property
    def fingerprint(self) -> str:
        """A fingerprint of the reference: equal references have equal fingerprints."""
        if self.images is not None:
            return self.images.fingerprint
        assert self.statistics_file is not None
        return f"npz {file_sha256(self.statistics_file)}"

    def uses_statistics_file(self, network: FeatureNetwork) -> bool:
        """Return whether the file's mean and covariance replace those of its images."""
        return self.statistics_file is not None and isinstance(network, InceptionFeatures)

    def statistics(self, network: FeatureNetwork, cache: Path) -> FeatureStatistics:
        """Compute the feature statistics, or read them from the folder `cache`.

        Shows a progress bar.
        """
        if self.images is None:
            found = FeatureStatistics(torch.empty(0), torch.empty(0), torch.empty(0, 2048))
        else:
            with tqdm(total=self.images.count, unit="image", desc="reference") as bar:
                found = cached_statistics(network, self.images, cache, bar.update)
                bar.update(self.images.count - bar.n)
        if self.statistics_file is None or not self.uses_statistics_file(network):
            return found
        arrays = read_arrays(self.statistics_file, "mu", "sigma")
        mean, covariance = (torch.from_numpy(arrays[n]).double() for n in ("mu", "sigma"))
        return dataclasses.replace(found, mean=mean, factor=covariance_factor(covariance))


def cached_statistics(
    network: FeatureNetwork,
    images: StoredImages,
    cache: Path,
    progress: Callable[[int], object] | None = None,
) -> FeatureStatistics:
    """Compute statistics as `compute_statistics` does, or read them from the folder `cache`.

    A cache entry that is damaged or of other images or another network is computed anew. One that
    cannot be written is reported.
    """
    key = json.dumps(
        {
            "format": CACHE_VERSION,
            "images": images.fingerprint,
            "network": [network.name, network.input_size, network.resize, network.weights_hash],
            "kept": MAX_FEATURES,
        },
        sort_keys=True,
    )
    path = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    found = _read_entry(path, key)
    if found is not None:
        return found
    statistics = compute_statistics(network, images, progress)
    digest = sha256_of_named(_with_shapes(statistics.tensors()))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_tensors(path, statistics.tensors(), {"key": key, "hash": digest})
    except OSError as error:
        tqdm.write(f"statistics of the reference not cached: {error}", file=sys.stderr)
    return statistics


def _read_entry(path: Path, key: str) -> FeatureStatistics | None:
    """Read a cache entry; return None unless it is complete and has this key."""
    try:
        tensors, metadata = read_tensors(path)
    except CheckpointError:
        return None
    digest = sha256_of_named(_with_shapes(tensors))
    if metadata.get("key") != key or metadata.get("hash") != digest:
        return None
    # In memory of their own: a memory-mapped file could change while it is in use.
    return FeatureStatistics(**{n: t.clone() for n, t in tensors.items()}, cached=True)


def _with_shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors with dtype and shape in their names, so that a digest includes them."""
    return {f"{name} {x.dtype} {tuple(x.shape)}": x for name, x in tensors.items()}
