import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

from dimr_fast.cli import main
from dimr_fast.data.autoencoder import Autoencoder
from dimr_fast.data.images import ImageFolder
from dimr_fast.data.latents import DamagedShardError, LatentShards, open_shard
from dimr_fast.data.scaling import LatentScale
from dimr_fast.extraction import ExtractConfig, extract
from tests.support.photographs import copy_photographs, save_autoencoder

PLAIN, MIRRORED = torch.tensor([False]), torch.tensor([True])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 photographs in three classes, two unreadable images, and an autoencoder."""
    folder = tmp_path_factory.mktemp("inputs")
    copy_photographs(folder / "photos", {"cats": 3, "dogs": 6, "eels": 2})
    save_autoencoder(folder / "vae")
    photo = min((folder / "photos" / "dogs").iterdir())
    (folder / "photos" / "dogs" / "cut.jpg").write_bytes(photo.read_bytes()[:5000])
    (folder / "photos" / "eels" / "a_text.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def config(inputs: Path) -> ExtractConfig:
    """Five shards of up to 3 images, in batches of 2."""
    return ExtractConfig(
        images=inputs / "photos",
        autoencoder=str(inputs / "vae"),
        output=inputs / "latents",
        image_size=48,
        shard_size=3,
        batch_size=2,
        processes=1,
        device="cpu",
    )


@pytest.fixture(scope="module")
def latents(config: ExtractConfig) -> Path:
    """What one process makes in one run."""
    summary = extract(config)
    assert summary.finished
    return config.output


@pytest.fixture
def again(config: ExtractConfig, latents: Path, tmp_path: Path) -> ExtractConfig:
    """The same extraction into a copy of what it has made."""
    output = tmp_path / "copy"
    output.mkdir()
    for path in latents.iterdir():
        (output / path.name).write_bytes(path.read_bytes())
    return dataclasses.replace(config, output=output)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shard(config: ExtractConfig, number: int) -> Path:
    return config.output / f"shard-{number:05}.safetensors"


def test_the_manifest_says_what_is_there(config: ExtractConfig, latents: Path) -> None:
    manifest = json.loads((latents / "manifest.json").read_text())
    assert manifest["count"] == 11
    assert manifest["classes"] == {"cats": 3, "dogs": 6, "eels": 2}
    assert manifest["shape"] == [8, 6, 6]
    assert manifest["source"] == str(config.images)
    assert [entry["count"] for entry in manifest["shards"]] == [3, 2, 3, 2, 1]
    cut, text = manifest["skipped"]
    assert (cut["file"], text["file"]) == ("dogs/cut.jpg", "eels/a_text.png")
    assert "truncated" in cut["reason"]
    assert {path.name for path in latents.iterdir()} == {
        "manifest.json",
        *(f"shard-0000{i}.safetensors" for i in range(5)),
    }


def test_values_are_those_of_diffusers(config: ExtractConfig, latents: Path) -> None:
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(config.autoencoder, low_cpu_mem_usage=False)
    readable = Path(config.output).parent / "readable"
    copy_photographs(readable, {"cats": 3, "dogs": 6, "eels": 2})
    folder = ImageFolder(readable, 48)
    examples = LatentShards(latents)
    assert examples.classes == folder.classes
    assert torch.equal(examples.labels, folder.labels)
    assert examples.scale == LatentScale(0.18215)
    assert examples.shape == (4, 6, 6)
    order = torch.tensor([10, 3, 0, 3, 7, 1, 2, 4, 5, 6, 8, 9])
    mirrored = torch.arange(12) % 3 == 1
    pixels = folder.read(order, mirrored)
    with torch.no_grad():
        expected = theirs.encode(pixels / 127.5 - 1).latent_dist.parameters
    moments = examples.read(order, mirrored)
    assert moments.dtype == torch.float32
    torch.testing.assert_close(moments, expected)
    assert not torch.equal(examples.read(order[:1], PLAIN), examples.read(order[:1], MIRRORED))


def test_two_processes_leave_the_same_files(
    config: ExtractConfig, latents: Path, tmp_path: Path
) -> None:
    summary = extract(dataclasses.replace(config, output=tmp_path / "out", processes=2))
    assert [name for name, _ in summary.skipped] == ["dogs/cut.jpg", "eels/a_text.png"]
    assert contents(tmp_path / "out") == contents(latents)


def test_processes_of_a_launcher_leave_the_same_files(
    config: ExtractConfig, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun sets them, in any order; the last one to finish writes the manifest."""
    config = dataclasses.replace(config, output=tmp_path / "out", processes=None)
    for name, value in (("WORLD_SIZE", 3), ("LOCAL_WORLD_SIZE", 3)):
        monkeypatch.setenv(name, str(value))
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        summary = extract(config)
        assert summary.finished == (rank == 1)
        assert (config.output / "manifest.json").exists() == summary.finished
        assert ("others are at work" in summary.sentence()) != summary.finished
    assert contents(config.output) == contents(latents)


KILLED_IN_THE_THIRD_SHARD = """
import os, pickle, signal, sys
from dimr_fast import extraction
from dimr_fast.utils import tensors as files

def save_half(tensors, path, metadata):
    if "shard-00002" in path.name:
        path.write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    save_file(tensors, path, metadata)

save_file, files.save_file = files.save_file, save_half
extraction.extract(pickle.load(sys.stdin.buffer))
"""


def test_a_killed_extraction_goes_on(
    config: ExtractConfig, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, output=tmp_path / "out")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_THE_THIRD_SHARD],
        input=pickle.dumps(config),
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    first, second, unfinished = shard(config, 0), shard(config, 1), config.output.glob(".*.part")
    assert {path.name for path in config.output.iterdir()} == {
        *(first.name, second.name),
        *(path.name for path in unfinished),
    }
    assert len(list(config.output.iterdir())) == 3
    with pytest.raises(ValueError, match="expected a folder that dimr-fast extract has finished"):
        LatentShards(config.output)
    kept = [os.stat(path).st_mtime_ns for path in (first, second)]
    extract(config)
    assert contents(config.output) == contents(latents)
    assert [os.stat(path).st_mtime_ns for path in (first, second)] == kept


def test_a_finished_extraction_is_left_alone(again: ExtractConfig, latents: Path) -> None:
    before = {path: os.stat(path).st_mtime_ns for path in again.output.glob("shard*")}
    assert extract(again).images == 11
    assert {path: os.stat(path).st_mtime_ns for path in again.output.glob("shard*")} == before
    assert contents(again.output) == contents(latents)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 32}, "of image_size 48, not 32"),
        ({"dtype": "fp16"}, "of dtype fp32, not fp16"),
        ({"precision": "bf16"}, "of other autoencoder"),
        ({"shard_size": 4}, "of shard_size 3, not 4"),
    ],
)
def test_other_settings_are_refused(
    again: ExtractConfig, latents: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=f"output: got .*copy, which holds latents {message}"):
        extract(dataclasses.replace(again, **change))
    (again.output / "manifest.json").unlink()
    with pytest.raises(ValueError, match=f"output: got .*copy, which holds latents {message}"):
        extract(dataclasses.replace(again, **change))
    before = contents(latents)
    del before["manifest.json"]
    assert contents(again.output) == before


def test_another_set_of_images_is_refused(again: ExtractConfig, tmp_path: Path) -> None:
    copy_photographs(tmp_path / "photos", {"cats": 3, "dogs": 6, "eels": 2})
    with pytest.raises(ValueError, match="holds latents of other images"):
        extract(dataclasses.replace(again, images=tmp_path / "photos"))


def test_latents_are_told_apart_wherever_they_lie(again: ExtractConfig, latents: Path) -> None:
    assert LatentShards(again.output).fingerprint() == LatentShards(latents).fingerprint()
    manifest = json.loads((again.output / "manifest.json").read_text())
    manifest["shards"].pop()
    (again.output / "manifest.json").write_text(json.dumps(manifest))
    assert LatentShards(again.output).fingerprint() != LatentShards(latents).fingerprint()


def test_a_shard_that_is_not_whole_is_found_on_opening(again: ExtractConfig, latents: Path) -> None:
    path = shard(again, 2)
    whole = path.read_bytes()
    for damage in (whole[:-1], whole[:100], b"", whole + b"x", shard(again, 0).read_bytes(), None):
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(DamagedShardError, match="shard-00002"):
            LatentShards(again.output)
        extract(again)
        assert contents(again.output) == contents(latents), damage


def test_a_shard_cut_after_opening_is_found_on_reading(again: ExtractConfig) -> None:
    examples = LatentShards(again.output)
    path = shard(again, 4)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedShardError, match="shard-00004"):
        examples.read(torch.tensor([10]), PLAIN)
    assert len(examples.read(torch.tensor([0, 9]), torch.tensor([True, False]))) == 2


def test_an_altered_shard_is_found_by_its_checksum(again: ExtractConfig, latents: Path) -> None:
    path = shard(again, 1)
    altered = bytearray(path.read_bytes())
    altered[-1] ^= 1
    path.write_bytes(altered)
    with pytest.raises(DamagedShardError, match=r"altered since extraction: shard-00001"):
        LatentShards(again.output).verify()
    extract(again)
    LatentShards(again.output).verify()
    assert contents(again.output) == contents(latents)


class AsDataset(Dataset[torch.Tensor]):
    def __init__(self, examples: LatentShards) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.examples.read(torch.tensor([index]), MIRRORED)[0]


def test_latents_are_read_in_other_processes(latents: Path) -> None:
    examples = LatentShards(latents)
    expected = examples.read(torch.arange(11), torch.ones(11, dtype=torch.bool))
    loader = DataLoader(AsDataset(examples), batch_size=3, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), expected)
    copy = pickle.loads(pickle.dumps(examples))
    assert len(pickle.dumps(examples)) < 10_000
    assert torch.equal(copy.read(torch.arange(11), torch.ones(11, dtype=torch.bool)), expected)


def test_indices_outside_are_refused(latents: Path) -> None:
    examples = LatentShards(latents)
    assert examples.read(torch.tensor([], dtype=torch.int64), PLAIN[:0]).shape == (0, 8, 6, 6)
    for index in (-1, 11):
        with pytest.raises(IndexError, match=rf"got \[{index}\], expected 0..10"):
            examples.read(torch.tensor([index]), PLAIN)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_halves_the_files(
    config: ExtractConfig, latents: Path, tmp_path: Path, dtype: str
) -> None:
    small = dataclasses.replace(config, output=tmp_path / "out", dtype=dtype)
    extract(small)
    indices, views = torch.arange(11), torch.arange(11) % 2 == 0
    exact = LatentShards(latents).read(indices, views)
    stored = LatentShards(small.output).read(indices, views)
    assert torch.equal(stored, exact.to(stored.dtype))
    full, half = (open_shard(shard(c, 0)).moments.nbytes for c in (config, small))
    assert full == 2 * half


def test_moments_that_are_not_finite_stop_the_work(
    config: ExtractConfig, inputs: Path, tmp_path: Path
) -> None:
    save_autoencoder(tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["quant_conv.bias"] += 1e5
    save_file(weights, path, {"format": "pt"})
    large = dataclasses.replace(config, output=tmp_path / "out", autoencoder=str(path.parent))
    with pytest.raises(FloatingPointError, match="not finite in fp16: cats/"):
        extract(dataclasses.replace(large, dtype="fp16"))
    assert not list(large.output.iterdir())


def test_a_full_disk_keeps_what_is_there(
    config: ExtractConfig, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_until_full(tensors: dict[str, torch.Tensor], path: Path, **metadata: object) -> None:
        if "shard-00002" in path.name:
            path.write_bytes(b"half of it")
            raise SafetensorError("No space left on device")
        save_file(tensors, path, **metadata)

    config = dataclasses.replace(config, output=tmp_path / "out")
    with monkeypatch.context() as full:
        full.setattr("dimr_fast.utils.tensors.save_file", save_until_full)
        with pytest.raises(OSError, match=r"shard-00002\.safetensors: No space left"):
            extract(config)
    assert contents(config.output).keys() == {"shard-00000.safetensors", "shard-00001.safetensors"}
    extract(config)
    assert contents(config.output) == contents(latents)


def test_nothing_readable_is_an_error(config: ExtractConfig, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("no image")
    bad = dataclasses.replace(config, images=tmp_path / "photos", output=tmp_path / "out")
    with pytest.raises(ValueError, match=r"none readable \(a.png: cannot identify"):
        extract(bad)


def test_bad_settings_are_refused_before_any_work(config: ExtractConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, output=tmp_path / "out")
    for change, message in (
        ({"image_size": 50}, "image_size: got 50, expected a multiple of 8"),
        ({"batch_size": 0}, "batch_size: got 0, expected 1 or more"),
        ({"shard_size": 0}, "shard_size: got 0"),
        ({"processes": 0}, "processes: got 0"),
        ({"dtype": "fp8"}, "dtype: got 'fp8', expected one of fp32, bf16, fp16"),
        ({"images": tmp_path / "nowhere"}, "expected an existing folder"),
        ({"autoencoder": str(tmp_path)}, "autoencoder: got"),
        ({"output": config.images / "latents"}, "expected a folder outside the images'"),
    ):
        with pytest.raises(ValueError, match=message):
            extract(dataclasses.replace(config, **change))
    assert not config.output.exists()


def test_mirrored_moments_are_those_of_the_mirrored_image(latents: Path, inputs: Path) -> None:
    examples = LatentShards(latents)
    autoencoder = Autoencoder.load(str(inputs / "vae"), torch.device("cpu"))
    folder = inputs / "one"
    copy_photographs(folder, {"cats": 1})
    image = ImageFolder(folder, 48).read(torch.tensor([0]), PLAIN)
    first = torch.tensor([0])
    torch.testing.assert_close(examples.read(first, PLAIN), autoencoder.moments(image))
    torch.testing.assert_close(examples.read(first, MIRRORED), autoencoder.moments(image.flip(3)))


def test_the_command(
    again: ExtractConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["extract", "--images", str(again.images), "--autoencoder", again.autoencoder]
    command += ["--image-size", "48", "--shard-size", "3", "--processes", "1"]
    assert main([*command, "--output", str(again.output)]) == 0
    assert (
        "11 images of 3 classes in 5 shards; skipped 2 unreadable\n  dogs/cut.jpg: "
        in capsys.readouterr().out
    )
    assert main([*command, "--output", str(again.images / "x")]) == 2
    assert "outside the images'" in capsys.readouterr().err
