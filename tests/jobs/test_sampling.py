"""Sampling from a checkpoint as a user does it."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dimr_fast import DiMR
from dimr_fast.checkpoint import (
    TrainedModel,
)
from dimr_fast.config import preset
from dimr_fast.data.scaling import LatentScale, PixelScale
from dimr_fast.sampling import (
    SampleConfig,
    Sampler,
    balanced_labels,
    sample,
    sample_images,
)
from dimr_fast.sampling import job as job_module
from tests.support.models import Doubling, trained_model, write_checkpoint


@pytest.fixture
def trained() -> TrainedModel:
    return trained_model()


def config(trained: TrainedModel, folder: Path, **changes: Any) -> SampleConfig:
    """A job of 12 images in batches of 2, which writes everything into `folder`/out."""
    checkpoint = folder / "checkpoint.safetensors"
    if not checkpoint.exists():
        write_checkpoint(trained, checkpoint)
    sampler = Sampler(steps=2, batch_size=2, precision="fp32")
    values: dict[str, Any] = {
        "checkpoint": checkpoint,
        "output": folder / "out",
        "per_class": 2,
        "formats": ("grid", "png", "npz"),
        "sampler": sampler,
    }
    return SampleConfig(**(values | changes))


def command(job: SampleConfig) -> list[str]:
    """The same job on the command line."""
    sampler = job.sampler
    options = {
        "--checkpoint": job.checkpoint,
        "--output": job.output,
        "--per-class": job.per_class,
        "--steps": sampler.steps,
        "--batch-size": sampler.batch_size,
        "--precision": sampler.precision,
    }
    words = [str(word) for option in options.items() for word in option]
    return ["sample", *words, "--formats", *job.formats]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the report, which names the folder's own checkpoint."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "sample.json"
    }


def test_grid_folder_and_npz_hold_the_same_images(trained: TrainedModel, tmp_path: Path) -> None:
    written = sample(config(trained, tmp_path, count=11))
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
    # The class that has one image less leaves one column, each pixel three times as large.
    assert grid.shape[0] == 6 * (3 * 16 + 2)
    assert np.array_equal(grid[:48:3, -50:-2:3], images[0])
    assert np.array_equal(grid[50:98:3, -50:-2:3], images[1])
    report = json.loads((out / "sample.json").read_text())
    assert report["finished"]
    assert (report["count"], report["classes"]) == (11, list("abcdef"))
    assert report["sampler"]["solver"] == "DPM-Solver++ single-step, order 3"
    assert (report["sampler"]["precision"], report["sampler"]["noise_limit"]) == ("fp32", 2.5)
    direct = sample_images(trained, balanced_labels(11, 6), config(trained, tmp_path).sampler)
    assert np.array_equal(direct.permute(0, 2, 3, 1), images)


def test_a_finished_job_is_left_as_it_is(trained: TrainedModel, tmp_path: Path) -> None:
    job = config(trained, tmp_path, formats=("grid",))
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


def test_chosen_classes(trained: TrainedModel, tmp_path: Path) -> None:
    sample(config(trained, tmp_path, classes=("e", "1"), formats=("npz",)))
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert file["arr_1"].tolist() == [4, 1, 4, 1]
    report = json.loads((tmp_path / "out" / "sample.json").read_text())
    assert report["classes"] == ["e", "b"]


KILLED_WHILE_DRAWING = """
    import os, signal, sys
    from dimr_fast import cli
    from dimr_fast.sampling import job as sampling

    calls, write = 0, sampling.write_png

    def killing(image, path):
        global calls
        calls += 1
        if calls == 6:  # the second image of the third part
            path.with_name(f".{path.name}.1.part").write_bytes(b"half a picture")
            os.kill(os.getpid(), signal.SIGKILL)
        write(image, path)

    sampling.write_png = killing
    cli.main(sys.argv[1:])
"""


def test_a_killed_job_goes_on_and_ends_as_one_that_was_not(
    trained: TrainedModel, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    sample(config(trained, whole))
    job = config(trained, parts)
    script = [sys.executable, "-c", textwrap.dedent(KILLED_WHILE_DRAWING)]
    done = subprocess.run([*script, *command(job)], stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == -signal.SIGKILL
    kept = job.output / "parts" / "00000000.npy"
    times = kept.stat().st_mtime_ns
    assert len(list(kept.parent.glob("*.npy"))) == 2
    assert not json.loads((job.output / "sample.json").read_text())["finished"]

    for change, message in (
        ({"per_class": 3}, "a job with count 12 is unfinished"),
        ({"formats": ("npz",)}, "a job with formats .* is unfinished"),
        ({"classes": ("a", "b", "c")}, "a job with count 12 is unfinished"),
        ({"sampler": dataclasses.replace(job.sampler, seed=1)}, "a job with seed 0 is unfinished"),
        ({"sampler": dataclasses.replace(job.sampler, batch_size=3)}, "a job with batch_size 2"),
        ({"sampler": dataclasses.replace(job.sampler, solver="ddim")}, "a job with solver 'DPM"),
    ):
        with pytest.raises(ValueError, match=f"output: got .*, where {message}"):
            sample(dataclasses.replace(job, **change))
    with torch.no_grad():
        next(trained.model.parameters()).add_(1)
    write_checkpoint(trained, parts / "other.safetensors")
    with pytest.raises(ValueError, match="a job of other weights is unfinished"):
        sample(dataclasses.replace(job, checkpoint=parts / "other.safetensors"))
    assert kept.stat().st_mtime_ns == times

    # Precision may be left to what the job began with, and the checkpoint have moved.
    moved = (parts / "checkpoint.safetensors").rename(parts / "moved.safetensors")
    sampler = dataclasses.replace(job.sampler, precision="auto")
    sample(dataclasses.replace(job, checkpoint=moved, sampler=sampler))
    assert contents(job.output) == contents(whole / "out")


def test_processes_draw_what_one_draws(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started here, and by a launcher; each part is one process's, so that bits are the same."""
    alone, started, launched = (tmp_path / name for name in ("alone", "started", "launched"))
    for folder in (alone, started, launched):
        folder.mkdir()
    sample(config(trained, alone))
    sample(config(trained, started, processes=2))
    assert contents(started / "out") == contents(alone / "out")

    job = config(trained, launched)
    second = subprocess.Popen(
        [sys.executable, "-m", "dimr_fast", *command(job)],
        env=os.environ | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(sample(job)) == 4
    assert second.communicate(timeout=120) == ("", None)
    assert second.returncode == 0
    assert contents(launched / "out") == contents(alone / "out")


def test_a_failing_process_is_reported(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = config(trained, tmp_path, processes=2, formats=("png",))
    (tmp_path / "out").mkdir()
    # What the processes are to write into is a file, which the check before them has not seen.
    monkeypatch.setattr(
        "dimr_fast.sampling.job.prepare_output",
        lambda *_: (tmp_path / "out" / "images").write_text(""),
    )
    with pytest.raises(ChildProcessError, match=r"process \d stopped: .*images"):
        sample(job)


def test_processes_are_the_launchers_business_where_there_is_one(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"processes: got 2, expected None or 1"):
        sample(config(trained, tmp_path, processes=2))


def test_a_process_does_not_wait_for_the_first_one_for_ever(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(TimeoutError, match="rank 0 has not begun"):
        sample(config(trained, tmp_path), start_timeout=0.2)


def test_what_is_not_finite_is_never_a_picture(trained: TrainedModel, tmp_path: Path) -> None:
    with torch.no_grad():
        next(trained.model.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"images 0\.\.1: not finite in fp32"):
        sample(config(trained, tmp_path))
    assert not (tmp_path / "out" / "samples.npz").exists()


def test_a_grid_alone_draws_no_class_that_it_does_not_show(tmp_path: Path) -> None:
    names = tuple(f"class {i}" for i in range(40))
    model = DiMR(preset("tiny").fitted(3, (16, 16), 41))
    wide = TrainedModel(model.eval(), names, PixelScale(100.0, 50.0))
    sampler = Sampler(steps=1, batch_size=64, precision="fp32")
    sample(config(wide, tmp_path, per_class=1, formats=("grid",), sampler=sampler))
    said = json.loads((tmp_path / "out" / "sample.json").read_text())
    assert (said["count"], said["classes"]) == (32, list(names[:32]))


def test_a_job_is_drawn_by_one_command_at_a_time(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dimr_fast.utils.files.LOCK_TIMEOUT", 0.3)
    job = config(trained, tmp_path)

    def meanwhile(*_: object) -> None:
        with pytest.raises(OSError, match="another process is writing there"):
            sample(job)

    finish = job_module._finish
    monkeypatch.setattr(job_module, "_finish", lambda job: meanwhile() or finish(job))
    sample(job)
    # As a kill at the very end leaves it.
    (job.output / "parts").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        sample(job)
    assert not (job.output / "parts").exists()


def test_a_checkpoint_that_changes_while_a_job_begins_is_noticed(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dimr_fast.sampling.job._weights_digest", lambda model: "that of before")
    with pytest.raises(ChildProcessError, match="has changed since the job began"):
        sample(config(trained, tmp_path, processes=2))


def test_latents_are_decoded(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = dataclasses.replace(trained, scale=LatentScale(0.5))
    job = config(latents, tmp_path, formats=("npz",))
    with pytest.raises(ValueError, match="autoencoder: got None, expected an AutoencoderKL"):
        sample(job)
    assert not job.output.exists()
    with pytest.raises(ValueError, match="autoencoder: got None, expected one to decode"):
        sample_images(latents, torch.arange(2), job.sampler)
    monkeypatch.setattr("dimr_fast.data.autoencoder.Autoencoder", Doubling)
    other = dataclasses.replace(job, autoencoder="the autoencoder")
    with pytest.raises(ValueError, match=r"of 3 channels and .*0\.18215.*, expected .*0\.5"):
        sample(other)
    monkeypatch.setattr(Doubling, "scale", latents.scale)
    sample(dataclasses.replace(job, autoencoder="the autoencoder"))
    with np.load(job.output / "samples.npz") as file:
        images = file["arr_0"]
    seen: list[torch.Tensor] = []

    def keep(z: torch.Tensor) -> torch.Tensor:
        seen.append(z)
        return Doubling().decode(z)

    direct = sample_images(latents, balanced_labels(12, 6), job.sampler, decode=keep)
    assert np.array_equal(direct.permute(0, 2, 3, 1), images)
    assert images.shape == (12, 32, 32, 3)
    # Unclipped, and divided by the scale's factor: wider than what the model works with.
    assert torch.cat(seen).std() > 1.5


def test_pixels_need_no_autoencoder(trained: TrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="autoencoder: got 'vae', expected None for pixels"):
        sample(config(trained, tmp_path, autoencoder="vae"))
    with pytest.raises(ValueError, match="autoencoder: got one, expected None"):
        sample_images(trained, torch.arange(2), Sampler(), decode=lambda z: z)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"precision": "fp8"}, "precision: got 'fp8', expected one of auto, fp32"),
        ({"seed": -1}, "seed: got -1"),
        ({"guidance": math.inf}, "guidance: got inf"),
        ({"guidance": -0.1}, r"guidance: got -0\.1"),
        ({"noise_limit": 0.0}, r"noise_limit: got 0\.0"),
        ({"solver": "euler"}, "solver: got 'euler', expected one of dpm"),
        ({"spacing": "even"}, "spacing: got 'even'"),
        ({"guidance_power": 0.0}, r"guidance_power: got 0\.0"),
        ({"guidance_interval": (0.5, 0.1)}, r"guidance_interval: got \(0\.5, 0\.1\)"),
    ],
)
def test_bad_settings_name_the_setting(
    trained: TrainedModel, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_checkpoint(trained, tmp_path / "c.safetensors")
    sampler, output = Sampler(**change), tmp_path / "out"
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
def test_bad_jobs_name_the_setting(
    trained: TrainedModel, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample(config(trained, tmp_path, **change))
    assert not (tmp_path / "out").exists()
