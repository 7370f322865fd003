"""Sampling from a checkpoint as a user does it: formats, classes, latents, errors."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dimr_fast import DiMR
from dimr_fast.checkpoint import TrainedModel
from dimr_fast.config import preset
from dimr_fast.data.autoencoder import Autoencoder
from dimr_fast.data.scaling import LatentScale, PixelScale
from dimr_fast.sampling import SampleConfig, SamplerConfig, balanced_labels, sample, sample_images
from tests.support.autoencoder import save_autoencoder
from tests.support.models import trained_model, write_checkpoint
from tests.support.sampling import contents, small_job


@pytest.fixture
def trained() -> TrainedModel:
    return trained_model()


def test_grid_folder_and_npz_hold_the_same_images(trained: TrainedModel, tmp_path: Path) -> None:
    written = sample(small_job(trained, tmp_path, count=11))
    out = tmp_path / "out"
    assert written == [out / name for name in ("grid.png", "images", "samples.npz", "sample.json")]
    assert {path.name for path in out.iterdir()} == {path.name for path in written}
    with np.load(out / "samples.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert (images.shape, images.dtype) == ((11, 16, 16, 3), np.uint8)
    assert np.array_equal(labels, balanced_labels(11, 6))
    names = sorted(path.name for path in (out / "images").iterdir())
    assert names == [f"{index:06}.png" for index in range(11)]
    for name, image in zip(names, images, strict=True):
        with Image.open(out / "images" / name) as picture:
            assert np.array_equal(np.asarray(picture), image)
    with Image.open(out / "grid.png") as picture:
        grid = np.asarray(picture)
    # A class with one image less leaves its last column empty. Pixels are three times as large.
    assert grid.shape[0] == 6 * (3 * 16 + 2)
    assert np.array_equal(grid[:48:3, -50:-2:3], images[0])
    assert np.array_equal(grid[50:98:3, -50:-2:3], images[1])
    report = json.loads((out / "sample.json").read_text())
    assert report["finished"]
    assert (report["count"], report["classes"]) == (11, list("abcdef"))
    assert report["sampler"]["solver"] == "DPM-Solver++ multistep, order 2"
    assert (report["sampler"]["precision"], report["sampler"]["noise_limit"]) == ("fp32", 2.5)
    direct = sample_images(trained, balanced_labels(11, 6), small_job(trained, tmp_path).sampler)
    assert np.array_equal(direct.permute(0, 2, 3, 1), images)


def test_a_finished_job_is_not_changed(trained: TrainedModel, tmp_path: Path) -> None:
    job = small_job(trained, tmp_path, formats=("grid",))
    grid, report = sample(job)
    before = contents(tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"sample\.json exists already"):
        sample(job)
    assert contents(tmp_path / "out") == before
    report.unlink()
    with pytest.raises(FileExistsError, match=r"grid\.png exists already"):
        sample(job)
    grid.unlink()
    report.write_text('{"of": "something else"}')
    with pytest.raises(FileExistsError, match=r"sample\.json exists already"):
        sample(job)


def test_classes_are_chosen_by_name_or_number(trained: TrainedModel, tmp_path: Path) -> None:
    sample(small_job(trained, tmp_path, classes=("e", "1"), formats=("npz",)))
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert file["arr_1"].tolist() == [4, 1, 4, 1]
    report = json.loads((tmp_path / "out" / "sample.json").read_text())
    assert report["classes"] == ["e", "b"]


def test_images_without_class(trained: TrainedModel, tmp_path: Path) -> None:
    """By the null class, or by guidance of -1, which is exactly its prediction."""
    sampler = SamplerConfig(steps=2, batch_size=2, precision="fp32", guidance=3.0)
    job = small_job(trained, tmp_path, classes=("none",), formats=("grid", "npz"), sampler=sampler)
    sample(job)
    with np.load(tmp_path / "out" / "samples.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert labels.tolist() == [trained.model.config.null_class] * 2
    report = json.loads((tmp_path / "out" / "sample.json").read_text())
    assert report["classes"] == ["none"]
    without = dataclasses.replace(sampler, guidance=-1.0)
    direct = sample_images(trained, torch.arange(2), without)
    assert np.array_equal(direct.permute(0, 2, 3, 1), images)


def test_a_model_without_classes_draws_images_without_class(tmp_path: Path) -> None:
    model = DiMR(preset("tiny").fitted(3, (16, 16), 1)).eval()
    sampler = SamplerConfig(steps=1, precision="fp32")
    job = small_job(TrainedModel(model, (), PixelScale(100.0, 50.0)), tmp_path, sampler=sampler)
    sample(job)
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2


def test_a_class_may_be_called_none(trained: TrainedModel, tmp_path: Path) -> None:
    named = dataclasses.replace(trained, classes=("a", "none", "c", "d", "e", "f"))
    sample(small_job(named, tmp_path, classes=("none",), formats=("npz",)))
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert file["arr_1"].tolist() == [1, 1]


def test_images_that_are_not_finite_are_an_error(trained: TrainedModel, tmp_path: Path) -> None:
    with torch.no_grad():
        next(trained.model.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"images 0\.\.1: not finite in fp32"):
        sample(small_job(trained, tmp_path))
    assert not (tmp_path / "out" / "samples.npz").exists()


def test_a_grid_alone_draws_only_the_classes_that_it_shows(tmp_path: Path) -> None:
    names = tuple(f"class {i}" for i in range(40))
    model = DiMR(preset("tiny").fitted(3, (16, 16), 41))
    wide = TrainedModel(model.eval(), names, PixelScale(100.0, 50.0))
    sampler = SamplerConfig(steps=1, batch_size=64, precision="fp32")
    sample(small_job(wide, tmp_path, per_class=1, formats=("grid",), sampler=sampler))
    said = json.loads((tmp_path / "out" / "sample.json").read_text())
    assert (said["count"], said["classes"]) == (32, list(names[:32]))


def test_latents_are_decoded(trained: TrainedModel, tmp_path: Path) -> None:
    latents = dataclasses.replace(trained, scale=LatentScale(0.5))
    job = small_job(latents, tmp_path, formats=("npz",))
    with pytest.raises(ValueError, match="autoencoder: got None, expected an AutoencoderKL"):
        sample(job)
    assert not job.output.exists()
    with pytest.raises(ValueError, match="autoencoder: got None, expected one to decode"):
        sample_images(latents, torch.arange(2), job.sampler)
    rgb = {"blocks": 2, "latent_channels": 3}
    other = save_autoencoder(tmp_path / "other", **rgb)
    with pytest.raises(ValueError, match=r"of 3 channels and .*0\.18215.*, expected .*0\.5"):
        sample(dataclasses.replace(job, autoencoder=str(other)))
    folder = save_autoencoder(tmp_path / "autoencoder", scaling_factor=0.5, **rgb)
    sample(dataclasses.replace(job, autoencoder=str(folder)))
    with np.load(job.output / "samples.npz") as file:
        images = file["arr_0"]
    seen: list[torch.Tensor] = []

    autoencoder = Autoencoder.load(str(folder), torch.device("cpu"))

    def decode(z: torch.Tensor) -> torch.Tensor:
        seen.append(z)
        return autoencoder.decode(z)

    direct = sample_images(latents, balanced_labels(12, 6), job.sampler, decode=decode)
    assert np.array_equal(direct.permute(0, 2, 3, 1), images)
    assert images.shape == (12, 32, 32, 3)
    # Not clipped, and divided by the scale's factor: wider than the model's outputs.
    assert torch.cat(seen).std() > 1.5


def test_an_autoencoder_for_a_pixel_model_is_refused(trained: TrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="autoencoder: got 'vae', expected None for pixels"):
        sample(small_job(trained, tmp_path, autoencoder="vae"))
    with pytest.raises(ValueError, match="autoencoder: got one, expected None"):
        sample_images(trained, torch.arange(2), SamplerConfig(), decode=lambda z: z)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"precision": "fp4"}, "precision: got 'fp4', expected one of auto, fp32"),
        ({"seed": -1}, "seed: got -1"),
        ({"guidance": math.inf}, "guidance: got inf"),
        ({"guidance": -1.1}, r"guidance: got -1\.1, expected .* -1 \(without class\) or more"),
        ({"guidance": -1.0, "guidance_power": 2.0}, r"guidance: got -1\.0, expected .*0 or more"),
        ({"guidance_interval": (2.0, 3.0)}, r"guidance_interval: got \(2\.0, 3\.0\), expected"),
        ({"guidance_interval": (-1.0, 0.5)}, r"guidance_interval: got \(-1\.0, 0\.5\)"),
        ({"seed": 2**64}, "seed: got 18446744073709551616"),
        ({"noise_limit": 0.0}, r"noise_limit: got 0\.0"),
        ({"solver": "rk4"}, "solver: got 'rk4', expected one of dpm"),
        ({"defaults": "best"}, "defaults: got 'best', expected published or None"),
        ({"spacing": "even"}, "spacing: got 'even'"),
        ({"guidance_power": 0.0}, r"guidance_power: got 0\.0"),
        ({"guidance_interval": (0.5, 0.1)}, r"guidance_interval: got \(0\.5, 0\.1\)"),
    ],
)
def test_bad_sampler_settings_are_named(
    trained: TrainedModel, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_checkpoint(trained, tmp_path / "c.safetensors")
    sampler, output = SamplerConfig(**change), tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        sample(SampleConfig(checkpoint=tmp_path / "c.safetensors", output=output, sampler=sampler))
    assert not output.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_class": 0}, "per_class: got 0"),
        ({"count": 0}, "count: got 0"),
        ({"formats": ()}, r"formats: got \(\)"),
        ({"formats": ("gif",)}, r"formats: got \('gif',\), expected one or more of grid, png, npz"),
        ({"processes": 0}, "processes: got 0"),
        ({"classes": ("g",)}, r"classes: got 'g', expected a name \(a, b, .*\) or 0\.\.5"),
        ({"classes": ("6",)}, "classes: got '6'"),
    ],
)
def test_bad_job_settings_are_named(
    trained: TrainedModel, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample(small_job(trained, tmp_path, **change))
    assert not (tmp_path / "out").exists()
