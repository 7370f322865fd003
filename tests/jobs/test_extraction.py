"""Encoding images as latents: the same files from any number of processes and runs."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

from dimr_fast.cli import main
from dimr_fast.data.autoencoder import Autoencoder
from dimr_fast.data.images import ImageFolder, list_images
from dimr_fast.data.latents import DamagedShardError, LatentShards, open_shard
from dimr_fast.data.scaling import LatentScale
from dimr_fast.extraction import ExtractConfig, extract
from tests.support.autoencoder import save_autoencoder
from tests.support.files import file_size_limit
from tests.support.photographs import copy_photographs

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
    """Return the output of one process in one run."""
    summary = extract(config)
    assert summary.finished
    return config.output


@pytest.fixture
def again(config: ExtractConfig, latents: Path, tmp_path: Path) -> ExtractConfig:
    """Return the same extraction with a copy of its output."""
    output = tmp_path / "copy"
    output.mkdir()
    for path in latents.iterdir():
        (output / path.name).write_bytes(path.read_bytes())
    return dataclasses.replace(config, output=output)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def command_words(config: ExtractConfig) -> list[str]:
    """Return the words of an extraction on the command line."""
    options = {
        "--images": config.images,
        "--autoencoder": config.autoencoder,
        "--output": config.output,
        "--image-size": config.image_size,
        "--shard-size": config.shard_size,
        "--batch-size": config.batch_size,
        "--processes": config.processes,
        "--device": config.device,
    }
    return ["extract", *(str(word) for option in options.items() for word in option)]


def shard(config: ExtractConfig, number: int) -> Path:
    """Return the path of a shard."""
    return config.output / f"shard-{number:05}.safetensors"


def test_the_manifest_describes_the_output(config: ExtractConfig, latents: Path) -> None:
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


def test_moments_equal_those_of_diffusers(config: ExtractConfig, latents: Path) -> None:
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


def test_two_processes_write_the_same_files(
    config: ExtractConfig, latents: Path, tmp_path: Path
) -> None:
    summary = extract(dataclasses.replace(config, output=tmp_path / "out", processes=2))
    assert [name for name, _ in summary.skipped] == ["dogs/cut.jpg", "eels/a_text.png"]
    assert contents(tmp_path / "out") == contents(latents)


def test_processes_of_a_launcher_write_the_same_files(
    config: ExtractConfig, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They finish in any order; the last one writes the manifest."""
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


def test_a_killed_and_resumed_extraction_equals_an_undisturbed_one(
    config: ExtractConfig, tmp_path: Path
) -> None:
    """A named pipe in place of an image of the third shard: reading it takes for ever."""
    photos = tmp_path / "photos"
    shutil.copytree(config.images, photos)
    (photos / "dogs" / "cut.jpg").unlink()
    blocking = photos / "dogs" / "imagenet_05_z.jpg"  # the seventh image
    # Empty, as a pipe is, so that both are the same set of images.
    blocking.write_bytes(b"")
    assert list_images(photos).names.index("dogs/imagenet_05_z.jpg") == 6
    whole = dataclasses.replace(config, images=photos, output=tmp_path / "whole")
    extract(whole)

    blocking.unlink()
    os.mkfifo(blocking)
    parts = dataclasses.replace(whole, output=tmp_path / "parts")
    first, second = shard(parts, 0), shard(parts, 1)
    with subprocess.Popen([sys.executable, "-m", "dimr_fast", *command_words(parts)]) as process:
        while not second.exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert {path.name for path in parts.output.iterdir()} == {first.name, second.name}
    # A kill while a shard is written leaves an unfinished file.
    for name in (shard(parts, 2).name, "manifest.json"):
        (parts.output / f".{name}.1.part").write_bytes(b"half of it")
    with pytest.raises(ValueError, match="expected a folder that dimr-fast extract has finished"):
        LatentShards(parts.output)
    kept = [os.stat(path).st_mtime_ns for path in (first, second)]
    blocking.unlink()
    blocking.write_bytes(b"")
    extract(parts)
    assert contents(parts.output) == contents(whole.output)
    assert [os.stat(path).st_mtime_ns for path in (first, second)] == kept


def test_a_finished_extraction_is_not_changed(again: ExtractConfig, latents: Path) -> None:
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


def test_fingerprints_identify_latents_in_any_folder(again: ExtractConfig, latents: Path) -> None:
    assert LatentShards(again.output).fingerprint() == LatentShards(latents).fingerprint()
    manifest = json.loads((again.output / "manifest.json").read_text())
    manifest["shards"].pop()
    (again.output / "manifest.json").write_text(json.dumps(manifest))
    assert LatentShards(again.output).fingerprint() != LatentShards(latents).fingerprint()


def test_an_incomplete_shard_is_detected_on_opening(again: ExtractConfig, latents: Path) -> None:
    path = shard(again, 2)
    whole = path.read_bytes()
    for damage in (whole[:-1], whole[:100], b"", whole + b"x", shard(again, 0).read_bytes(), None):
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(DamagedShardError, match="shard-00002"):
            LatentShards(again.output)
        extract(again)
        assert contents(again.output) == contents(latents), damage


def test_a_shard_that_is_cut_after_opening_is_detected_on_reading(again: ExtractConfig) -> None:
    examples = LatentShards(again.output)
    path = shard(again, 4)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedShardError, match="shard-00004"):
        examples.read(torch.tensor([10]), PLAIN)
    assert len(examples.read(torch.tensor([0, 9]), torch.tensor([True, False]))) == 2


def test_an_altered_shard_is_detected_by_its_checksum(again: ExtractConfig, latents: Path) -> None:
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


def test_moments_that_are_not_finite_are_an_error(
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


def test_a_full_disk_keeps_the_shards_that_exist(again: ExtractConfig, latents: Path) -> None:
    (again.output / "manifest.json").unlink()
    shard(again, 2).unlink()
    before = contents(again.output)
    with file_size_limit(4500), pytest.raises(OSError, match=r"shard-00002\.safetensors: "):
        extract(again)
    assert contents(again.output) == before
    extract(again)
    assert contents(again.output) == contents(latents)


def test_a_class_without_a_readable_image_is_named(config: ExtractConfig, tmp_path: Path) -> None:
    copy_photographs(tmp_path / "photos", {"cats": 2})
    (tmp_path / "photos" / "dogs").mkdir()
    (tmp_path / "photos" / "dogs" / "a.png").write_text("no image")
    summary = extract(
        dataclasses.replace(config, images=tmp_path / "photos", output=tmp_path / "out")
    )
    assert summary.empty_classes == ("dogs",)
    assert "no image of dogs could be read: a model cannot learn to draw it" in summary.sentence()


def test_a_shard_without_its_record_is_made_anew(again: ExtractConfig, latents: Path) -> None:
    path = shard(again, 1)
    (again.output / "manifest.json").unlink()
    for text in ("{}", "5"):
        save_file(load_file(path), path, {"dimr_fast": text})
        extract(again)
        assert contents(again.output) == contents(latents)


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
        ({"output": config.images / "latents"}, "expected a folder outside .*photos"),
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


def test_the_command(again: ExtractConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command_words(again)) == 0
    assert (
        "11 images of 3 classes in 5 shards; skipped 2 unreadable\n  dogs/cut.jpg: "
        in capsys.readouterr().out
    )
    assert main(command_words(dataclasses.replace(again, output=again.images / "x"))) == 2
    assert f"expected a folder outside {again.images}" in capsys.readouterr().err
