"""Copying the published code's features to shards: the same numbers, without running code."""

import contextlib
import dataclasses
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dimr_fast import cli
from dimr_fast.data.features import read_feature
from dimr_fast.data.imagenet import default_classes
from dimr_fast.data.latents import LatentShards
from dimr_fast.data.scaling import LatentScale
from dimr_fast.extraction import ExtractConfig, extract
from dimr_fast.training import train
from tests.support.memory import memory_from_here
from tests.support.published_features import published_features, write_pair
from tests.support.training import small_run

LABELS = [0, 0, 1, 1, 2, 3, 3, 3, 5, 5, 5]


def settings(folder: Path, output: Path, **changes: Any) -> ExtractConfig:
    """Shards of four images, from features that were written in batches of three."""
    values: dict[str, Any] = {"feature_batch": 3, "shard_size": 4, "processes": 1}
    return ExtractConfig(from_features=folder, output=output, **(values | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_all(folder: Path) -> torch.Tensor:
    latents = LatentShards(folder)
    latents.verify()
    indices = torch.arange(len(latents))
    views = [latents.read(indices, torch.full_like(indices, m, dtype=torch.bool)) for m in (0, 1)]
    return torch.stack(views, 1)


@pytest.mark.parametrize("batch", [3, 4, 256])
def test_shards_hold_the_features(tmp_path: Path, batch: int) -> None:
    moments = published_features(tmp_path / "features", LABELS, batch)
    summary = extract(settings(tmp_path / "features", tmp_path / "out", feature_batch=batch))
    assert (summary.images, summary.classes, summary.shards) == (11, 6, 3)
    assert torch.equal(read_all(tmp_path / "out"), torch.from_numpy(moments))
    latents = LatentShards(tmp_path / "out")
    assert latents.labels.tolist() == LABELS
    assert latents.classes == ("0", "1", "2", "3", "4", "5")
    assert latents.scale == LatentScale(0.18215)
    assert latents.shape == (4, 4, 4)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_stored_dtype(tmp_path: Path, dtype: str) -> None:
    moments = published_features(tmp_path / "features", LABELS, 3, np.float64)
    extract(settings(tmp_path / "features", tmp_path / "out", dtype=dtype))
    expected = torch.from_numpy(moments).to({"fp16": torch.float16, "bf16": torch.bfloat16}[dtype])
    assert torch.equal(read_all(tmp_path / "out"), expected)


def test_the_command_copies_and_training_reads_the_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published_features(tmp_path / "features", [0, 1] * 8)
    words = ["extract", "--from-features", str(tmp_path / "features")]
    assert cli.main([*words, "--output", str(tmp_path / "out"), "--processes", "1"]) == 0
    assert "16 images of 2 classes in 1 shard" in capsys.readouterr().out
    config = small_run(tmp_path / "run", data=str(tmp_path / "out"), steps=1)
    assert train(config).steps == 1


def test_1000_classes_are_called_as_in_imagenet(tmp_path: Path) -> None:
    published_features(tmp_path / "features", [0, 999])
    extract(settings(tmp_path / "features", tmp_path / "out", feature_batch=256))
    assert LatentShards(tmp_path / "out").classes == default_classes(1000)


def test_moments_alone_are_one_class(tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    for number in range(4):
        np.save(tmp_path / "features" / f"{number}.npy", np.full((8, 4, 4), number, np.float32))
    extract(settings(tmp_path / "features", tmp_path / "out"))
    assert LatentShards(tmp_path / "out").labels.tolist() == [0, 0]
    assert read_all(tmp_path / "out")[:, :, 0, 0, 0].tolist() == [[0, 2], [1, 3]]


def test_processes_and_interruptions_do_not_change_the_shards(tmp_path: Path) -> None:
    published_features(tmp_path / "features", LABELS, 3)
    config = settings(tmp_path / "features", tmp_path / "one")
    extract(config)
    expected = contents(config.output)
    extract(dataclasses.replace(config, output=tmp_path / "two", processes=2))
    assert contents(tmp_path / "two") == expected
    # As after a kill, and with a damaged shard.
    (config.output / "manifest.json").unlink()
    (config.output / "shard-00000.safetensors").unlink()
    damaged = bytearray(expected["shard-00001.safetensors"])
    damaged[-1] ^= 1
    (config.output / "shard-00001.safetensors").write_bytes(damaged)
    kept = config.output / "shard-00002.safetensors"
    before = kept.stat().st_mtime_ns
    extract(config)
    assert contents(config.output) == expected
    assert kept.stat().st_mtime_ns == before


def test_other_features_are_not_mixed(tmp_path: Path) -> None:
    published_features(tmp_path / "a", LABELS, 3)
    published_features(tmp_path / "b", LABELS[::-1], 3)
    extract(settings(tmp_path / "a", tmp_path / "out"))
    with pytest.raises(ValueError, match="holds latents of other features"):
        extract(settings(tmp_path / "b", tmp_path / "out"))


@pytest.mark.parametrize(
    ("protocol", "core"), [(3, "numpy.core"), (3, "numpy._core"), (4, "numpy._core")]
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_files_of_every_numpy_are_read(
    tmp_path: Path, protocol: int, core: str, order: str
) -> None:
    """Older versions pickle by protocol 3; before numpy 2 the module was not called _core."""
    pair = np.empty(2, dtype=object)
    pair[0] = np.arange(128, dtype=f"{order}f4").reshape(8, 4, 4)
    pair[1] = np.dtype(f"{order}i8").type(7)
    path = tmp_path / "0.npy"
    np.save(path, pair)
    header = path.read_bytes()[: path.read_bytes().index(b"\n") + 1]
    pickled = pickle.dumps(pair, protocol=protocol)
    path.write_bytes(header + (pickled.replace(b"numpy._core", core.encode())))
    found = read_feature(path)
    assert found.label == 7
    assert torch.equal(found.moments, torch.arange(128.0).view(8, 4, 4))


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published_features(tmp_path / "features", LABELS, 3)
    bad, made = tmp_path / "features" / "2.npy", tmp_path / "made"
    for label in (Payload(made), [Payload(made)]):
        write_pair(bad, np.zeros((8, 4, 4), np.float32), label)
        words = ["extract", "--from-features", str(tmp_path / "features"), "--processes", "1"]
        assert cli.main([*words, "--feature-batch", "3", "--output", str(tmp_path / "out")]) == 2
        assert f"{bad}: not readable features (holds posix.mkdir" in capsys.readouterr().err
        assert not made.exists()
    # The payload is a working one.
    np.load(bad, allow_pickle=True)
    assert made.exists()


@pytest.mark.parametrize(
    ("moments", "label", "message"),
    [
        (np.zeros((8, 4, 4), np.int64), 0, "no array of real numbers"),
        (np.zeros((7, 4, 4), np.float32), 0, r"got shape \(7, 4, 4\), expected \[2C, h, w\]"),
        (np.zeros((8, 4), np.float32), 0, "got shape"),
        (np.zeros((8, 4, 4), np.float32), -1, "label: got -1"),
        (np.zeros((8, 4, 4), np.float32), np.float32(1.5), "label: got 1.5"),
        (np.zeros((8, 4, 4), np.float32), "cat", "label: got 'cat'"),
        (np.array(["a"] * 2), 0, "expected numbers"),
        ("words", 0, "no array of real numbers"),
    ],
)
def test_other_data_are_refused(tmp_path: Path, moments: Any, label: Any, message: str) -> None:
    write_pair(tmp_path / "0.npy", moments, label)
    with pytest.raises(OSError, match=rf"0.npy: not readable features .*{message}"):
        read_feature(tmp_path / "0.npy")


@pytest.mark.parametrize("keep", [0, 5, 100, 200, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    write_pair(tmp_path / "0.npy", np.zeros((8, 4, 4), np.float32), np.int64(3))
    content = (tmp_path / "0.npy").read_bytes()
    (tmp_path / "0.npy").write_bytes(content[:keep])
    with pytest.raises(OSError, match=r"0.npy: not readable features"):
        read_feature(tmp_path / "0.npy")


def test_damaged_files_only_raise_the_error_and_take_no_memory(tmp_path: Path) -> None:
    """Sizes in a damaged file may state gigabytes."""
    path = tmp_path / "0.npy"
    write_pair(path, np.zeros((2, 1, 1), np.float32), np.int64(3))
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    used = memory_from_here()
    for _ in range(1000):
        damaged = bytearray(content)
        for place in generator.integers(128, len(content), 3):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(OSError):
            read_feature(path)
    assert used() < 50 * 2**20


def test_bad_folders_and_settings_are_named_before_any_work(tmp_path: Path) -> None:
    features, output = tmp_path / "features", tmp_path / "out"
    published_features(features, LABELS, 3)
    (tmp_path / "empty").mkdir()
    for change, message in (
        ({"from_features": tmp_path / "none"}, "from_features: got .*none, expected a folder"),
        ({"from_features": tmp_path / "empty"}, "empty with 0 files"),
        ({"autoencoder": "vae"}, "autoencoder: got 'vae', expected None: features are encoded"),
        ({"images": features}, "images, from_features: got 2 of them, expected one"),
        ({"from_features": None}, "images, from_features: got 0 of them, expected one"),
        ({"feature_batch": 0}, "feature_batch: got 0, expected 1 or more"),
        ({"output": features / "out"}, "output: got .*, expected a folder outside"),
    ):
        with pytest.raises(ValueError, match=message):
            extract(dataclasses.replace(settings(features, output), **change))
    (features / "21.npy").rename(features / "22.npy")
    with pytest.raises(ValueError, match=r"without 21\.npy"):
        extract(settings(features, output))
    (features / "22.npy").unlink()
    with pytest.raises(ValueError, match="with 21 files"):
        extract(settings(features, output))
    assert not output.exists()


def test_a_wrong_batch_is_noticed_by_the_labels(tmp_path: Path) -> None:
    published_features(tmp_path / "features", list(range(11)), 3)
    with pytest.raises(
        ValueError, match=r"0\.npy \(label 0.*expected an image and its mirror.*256"
    ):
        extract(settings(tmp_path / "features", tmp_path / "out", feature_batch=256))


def test_moments_that_the_stored_dtype_cannot_hold_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    for number in range(2):
        write_pair(tmp_path / "features" / f"{number}.npy", np.full((8, 4, 4), 1e6), 0)
    with pytest.raises(FloatingPointError, match="not finite in fp16: images 0 to 0"):
        extract(settings(tmp_path / "features", tmp_path / "out", dtype="fp16"))


def test_training_on_features_names_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published_features(tmp_path / "features", LABELS)
    words = ["train", "--output", str(tmp_path / "run"), "--set", f"data={tmp_path / 'features'}"]
    assert cli.main(words) == 2
    expected = f"dimr-fast extract --from-features {tmp_path / 'features'} --output FOLDER"
    assert expected in capsys.readouterr().err


def test_the_manifest_states_the_source(tmp_path: Path) -> None:
    published_features(tmp_path / "features", LABELS, 3)
    extract(settings(tmp_path / "features", tmp_path / "out"))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"] == str((tmp_path / "features").resolve())
    assert manifest["autoencoder"] is None
