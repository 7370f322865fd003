"""Latent shards: autoencoder moments of images, in memory-mapped safetensors files.

A shard holds `moments`, [n, 2, 2C, h, w]: of each image as it is and mirrored, mean and log
variance of its latent; and `labels`, int64 [n]. `manifest.json` beside them says what they are of.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dimr_fast.data.scaling import LatentScale, scale_from_dict
from dimr_fast.device import DTYPES
from dimr_fast.files import write_tensors

MANIFEST = "manifest.json"
FORMAT = "dimr_fast latents 1"
ABOUT = "dimr_fast"
"""The one entry of a shard's metadata: safetensors writes several in any order."""


class DamagedShardError(OSError):
    """A shard that is missing, truncated, altered or of another kind; the message names it."""


@dataclass(frozen=True)
class Shard:
    """An opened shard; `moments` lie in the file, which is read where they are used."""

    moments: Tensor
    labels: Tensor
    about: dict[str, Any]
    """Its number, checksum, skipped files, and the settings it was made with."""

    def checksum(self) -> str:
        """SHA-256 of the labels' bytes and then the moments'."""
        return _checksum(self.moments, self.labels)


def open_shard(path: Path) -> Shard:
    """Map a shard into memory; DamagedShardError unless the file is there and whole."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()[ABOUT])
            return Shard(file.get_tensor("moments"), file.get_tensor("labels"), about)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise DamagedShardError(f"{path}: not a readable shard ({error})") from error


def write_shard(path: Path, moments: Tensor, labels: Tensor, about: dict[str, Any]) -> None:
    """Write a shard in one step; `about`, JSON values, with its checksum added. OSError likewise.

    The same arguments give the same bytes.
    """
    text = json.dumps({**about, "sha256": _checksum(moments, labels)})
    write_tensors(path, {"moments": moments, "labels": labels}, {ABOUT: text})


def _checksum(moments: Tensor, labels: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in (labels, moments):
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of finished latents; ValueError where there is none."""
    path = folder / MANIFEST
    expected = "expected a folder that dimr-fast extract has finished"
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"latents: got {folder}, {expected} ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"latents: got {path} of another kind, {expected}")
    return manifest


class LatentShards:
    """Latents written by `dimr-fast extract`, as training examples.

    Opening checks that every shard is there, whole and the one that the manifest names; `verify`
    checks their bytes. Files are mapped when first read, in each process anew, so an instance can
    be pickled. Raises ValueError for another folder, DamagedShardError for a bad shard.
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
        """SHA-256 of the shards' checksums."""
        return hashlib.sha256("".join(s["sha256"] for s in self._shards).encode()).hexdigest()

    def read(self, indices: Tensor, mirrored: Tensor) -> Tensor:
        """The moments at int64 `indices` [B], of the mirrored image where bool [B] `mirrored`.

        [B, 2C, h, w] in the dtype they are stored in, on the CPU; only these are read.
        IndexError for an index outside 0..N-1, DamagedShardError for a shard that has changed.
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
        """Read every shard and compare checksums; DamagedShardError names all that differ."""
        bad = [
            shard["file"]
            for number, shard in enumerate(self._shards)
            if self._open(number).checksum() != shard["sha256"]
        ]
        if bad:
            raise DamagedShardError(
                f"{self.path}: altered since extraction: {', '.join(bad)}; "
                "running the same extraction again makes them anew"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def _moments(self, number: int) -> Tensor:
        if number not in self._opened:
            self._opened[number] = self._open(number).moments
        return self._opened[number]

    def _open(self, number: int) -> Shard:
        entry = self._shards[number]
        shard = open_shard(self.path / entry["file"])
        expected = (self._dtype, (entry["count"], *self._views_shape), entry["count"])
        found = (shard.moments.dtype, tuple(shard.moments.shape), len(shard.labels))
        if found != expected or shard.about.get("sha256") != entry["sha256"]:
            raise DamagedShardError(
                f"{self.path / entry['file']}: not the shard that {MANIFEST} names"
            )
        return shard
