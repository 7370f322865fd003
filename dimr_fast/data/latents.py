"""Latent shards: autoencoder moments of images, in memory-mapped safetensors files.

A shard holds `moments` [n, 2, 2C, h, w], mean and log variance of the latents of each image and of
its mirror image, and `labels`, int64 [n]. `manifest.json` beside the shards describes them.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dimr_fast.data.scaling import LatentScale, scale_from_dict
from dimr_fast.errors import CheckpointError, DamagedShardError
from dimr_fast.utils.device import DTYPES
from dimr_fast.utils.tensors import read_tensors, sha256, write_tensors

MANIFEST = "manifest.json"
FORMAT = "dimr_fast latents 1"
ENTRIES = ("classes", "dtype", "scale", "settings", "shape", "shards")
"""Entries of the manifest that are read."""
METADATA_KEY = "dimr_fast"
"""The only entry of a shard's metadata: safetensors writes several entries in random order, and
equal shards must be equal files."""


@dataclass(frozen=True)
class LatentShard:
    """An open shard. `moments` are memory-mapped."""

    moments: Tensor
    labels: Tensor
    about: dict[str, Any]
    """Index, checksum, skipped files and the settings of the extraction."""

    def checksum(self) -> str:
        """Return the SHA-256 of the bytes of labels and moments, in this order."""
        return sha256(self.labels, self.moments)


def open_shard(path: Path) -> LatentShard:
    """Open a shard. Raises DamagedShardError where the file is missing or damaged."""
    try:
        tensors, metadata = read_tensors(path)
        about = json.loads(metadata[METADATA_KEY])
        if not isinstance(about, dict):
            raise TypeError(f"its metadata is {type(about).__name__}, expected an object")
        return LatentShard(tensors["moments"], tensors["labels"], about)
    except (CheckpointError, ValueError, TypeError, KeyError) as error:
        raise DamagedShardError(f"{path}: not a readable shard ({error})") from error


def write_shard(path: Path, moments: Tensor, labels: Tensor, about: dict[str, Any]) -> None:
    """Write a shard atomically, with the JSON values `about` and its checksum as metadata.

    The same arguments give the same bytes. Raises OSError where it cannot be written.
    """
    text = json.dumps({**about, "sha256": sha256(labels, moments)})
    write_tensors(path, {"moments": moments, "labels": labels}, {METADATA_KEY: text})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a finished extraction.

    Raises ValueError where there is none, or it lacks an entry.
    """
    path = folder / MANIFEST
    expected = "expected a folder that dimr-fast extract has finished"
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"latents: got {folder}, {expected} ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"latents: got {path} of another kind, {expected}")
    missing = [name for name in ENTRIES if name not in manifest]
    if missing:
        raise ValueError(f"latents: got {path} without {', '.join(missing)}, {expected}")
    return manifest


class LatentShards:
    """Latents written by `dimr-fast extract`, as training examples.

    The constructor checks that every shard exists, has the right size and is the one in the
    manifest; `verify` compares checksums. Each process maps files at first use, so instances can be
    pickled. Raises ValueError if the folder is not a finished extraction, DamagedShardError if a
    shard is damaged.
    """

    def __init__(self, path: Path) -> None:
        manifest = read_manifest(path)
        scale = scale_from_dict(manifest["scale"])
        assert isinstance(scale, LatentScale)
        channels, height, width = manifest["shape"]
        self.path = path
        self.scale = scale
        self.classes = tuple(manifest["classes"])
        self.shape = (channels // 2, height, width)
        self._views_shape = (2, channels, height, width)
        self._dtype = DTYPES[manifest["dtype"]]
        self._shards: list[dict[str, Any]] = manifest["shards"]
        counts = torch.tensor([shard["count"] for shard in self._shards])
        self._ends = counts.cumsum(0)
        self._opened: dict[int, Tensor] = {}
        self.labels = torch.cat([self._open(i).labels for i in range(len(self._shards))])

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the shards' checksums."""
        return hashlib.sha256("".join(s["sha256"] for s in self._shards).encode()).hexdigest()

    def read(self, indices: Tensor, mirrored: Tensor) -> Tensor:
        """Read the moments at int64 `indices` [B]; of the mirror image where `mirrored`, bool [B].

        Returns [B, 2C, h, w] in the stored dtype, on the CPU. Raises IndexError for an index
        outside 0..N-1, DamagedShardError for a shard that has changed.
        """
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"indices: got {indices.tolist()}, expected 0..{len(self) - 1}")
        shards = torch.searchsorted(self._ends, indices, right=True)
        counts = torch.diff(self._ends, prepend=torch.zeros(1, dtype=torch.int64))
        rows = indices - (self._ends - counts)[shards]
        moments = torch.empty(len(indices), *self._views_shape[1:], dtype=self._dtype)
        wanted = zip(shards.tolist(), rows.tolist(), mirrored.tolist(), strict=True)
        for place, (shard, row, view) in enumerate(wanted):
            moments[place] = self._moments(shard)[row, int(view)]
        return moments

    def verify(self) -> None:
        """Compare all checksums. Raises DamagedShardError naming the shards that differ."""
        bad = [
            shard["file"]
            for number, shard in enumerate(self._shards)
            if self._open(number).checksum() != shard["sha256"]
        ]
        if bad:
            raise DamagedShardError(
                f"{self.path}: altered since extraction: {', '.join(bad)}; "
                "run the same extraction again to repair them"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def _moments(self, number: int) -> Tensor:
        if number not in self._opened:
            self._opened[number] = self._open(number).moments
        return self._opened[number]

    def _open(self, number: int) -> LatentShard:
        entry = self._shards[number]
        shard = open_shard(self.path / entry["file"])
        expected = (self._dtype, (entry["count"], *self._views_shape), entry["count"])
        found = (shard.moments.dtype, tuple(shard.moments.shape), len(shard.labels))
        if found != expected or shard.about.get("sha256") != entry["sha256"]:
            raise DamagedShardError(
                f"{self.path / entry['file']}: does not match its entry in {MANIFEST}"
            )
        return shard
