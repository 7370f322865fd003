"""Folders of latents: their manifest and shards are checked when they are opened."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dimr_fast.data.latents import (
    FORMAT,
    MANIFEST,
    DamagedShardError,
    LatentShards,
    open_shard,
    write_shard,
)
from dimr_fast.data.scaling import LatentScale, scale_to_dict


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    """Return a folder of two latents of one class."""
    path = tmp_path / "shard-00000.safetensors"
    write_shard(path, torch.zeros(2, 2, 8, 4, 4), torch.zeros(2, dtype=torch.int64), {})
    manifest = {
        "format": FORMAT,
        "classes": {"cats": 2},
        "shape": [8, 4, 4],
        "dtype": "fp32",
        "scale": scale_to_dict(LatentScale()),
        "settings": {},
        "shards": [{"file": path.name, "count": 2, "sha256": open_shard(path).about["sha256"]}],
    }
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    return tmp_path


@pytest.mark.parametrize("key", ["scale", "shape", "classes", "dtype", "shards", "settings"])
def test_a_manifest_that_lacks_an_entry_is_named(latents: Path, key: str) -> None:
    assert len(LatentShards(latents)) == 2
    path = latents / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest[key]
    path.write_text(json.dumps(manifest))
    message = rf"latents: got .*manifest\.json without {key}, expected a folder that dimr-fast"
    with pytest.raises(ValueError, match=message):
        LatentShards(latents)


@pytest.mark.parametrize("text", ["[]", "5", "null", "{"])
def test_a_shard_whose_record_is_no_object_is_damaged(tmp_path: Path, text: str) -> None:
    path = tmp_path / "shard.safetensors"
    tensors = {"moments": torch.zeros(1, 2, 8, 4, 4), "labels": torch.zeros(1).long()}
    save_file(tensors, path, {"dimr_fast": text})
    with pytest.raises(DamagedShardError, match=r"shard\.safetensors: not a readable shard"):
        open_shard(path)


def test_indices_outside_are_refused(latents: Path) -> None:
    examples = LatentShards(latents)
    plain = torch.tensor([False])
    none = examples.read(torch.tensor([], dtype=torch.int64), plain[:0])
    assert none.shape == (0, 8, 4, 4)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=rf"got \[{index}\], expected 0\.\.1"):
            examples.read(torch.tensor([index]), plain)
