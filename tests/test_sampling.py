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
from saved import Doubling

from dimr_fast import DiMR, sampling
from dimr_fast.checkpoint import (
    CheckpointError,
    TrainedModel,
    load_checkpoint,
    load_model,
    load_published,
    save_checkpoint,
)
from dimr_fast.config import preset
from dimr_fast.data.scaling import LatentScale, PixelScale, scale_to_dict
from dimr_fast.diffusion import SOLVERS
from dimr_fast.inference import InferenceDiMR, optimize_for_inference
from dimr_fast.sampling import (
    ImageSampler,
    SampleConfig,
    Sampler,
    balanced_labels,
    sample,
    sample_images,
)

CLASSES = ("a", "b", "c", "d", "e", "f")


@pytest.fixture
def trained() -> TrainedModel:
    torch.manual_seed(0)
    model = DiMR.from_preset("tiny")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return TrainedModel(model.eval(), CLASSES, PixelScale(100.0, 50.0))


def write(trained: TrainedModel, path: Path) -> None:
    tensors = {f"ema.{name}": value for name, value in trained.model.state_dict().items()}
    metadata = {
        "config": trained.model.config.to_dict(),
        "classes": trained.classes,
        "scale": scale_to_dict(trained.scale),
    }
    save_checkpoint(path, tensors, metadata)


def test_an_image_does_not_depend_on_its_batch(trained: TrainedModel) -> None:
    labels = torch.arange(5)
    sampler = Sampler(steps=4, precision="fp32")
    together = sample_images(trained, labels, sampler)
    apart = sample_images(trained, labels, dataclasses.replace(sampler, batch_size=2))
    last = sample_images(trained, labels[3:], sampler, first=3)
    assert together.dtype == torch.uint8
    assert together.shape == (5, 3, 16, 16)
    # A batch of another size may take another order of summation, never more than a rounding.
    assert (together.int() - apart.int()).abs().max() <= 1
    assert (together[3:].int() - last.int()).abs().max() <= 1
    other = sample_images(trained, labels, dataclasses.replace(sampler, seed=1))
    assert (together.int() - other.int()).abs().float().mean() > 1


def test_sampling_takes_the_stated_number_of_evaluations(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []

    def watched(model: DiMR, dtype: torch.dtype) -> InferenceDiMR:
        optimised = optimize_for_inference(model, dtype)
        optimised.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
        return optimised

    monkeypatch.setattr("dimr_fast.sampler.optimize_for_inference", watched)
    sample_images(trained, torch.arange(3), Sampler(steps=5, guidance=0.4))
    assert batches == [6] * 5
    batches.clear()
    sample_images(trained, torch.arange(3), Sampler(steps=5, guidance=0.0))
    assert batches == [3] * 5


def test_start_noise_stays_within_its_limit(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[torch.Tensor] = []

    def solver(noise_fn: object, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        starts.append(x)
        return x

    monkeypatch.setitem(SOLVERS, "dpm++", solver)
    sample_images(trained, torch.arange(6), Sampler())
    sample_images(trained, torch.arange(6), Sampler(noise_limit=math.inf))
    latents = dataclasses.replace(trained, scale=LatentScale())
    sample_images(latents, torch.arange(6), Sampler(), decode=lambda z: z)
    assert torch.equal(starts[1], starts.pop())
    limited, drawn = starts
    assert limited.abs().max() == 2.5
    assert drawn.abs().max() > 3
    assert torch.equal(limited, drawn.clamp(-2.5, 2.5))
    assert abs(drawn.mean().item()) < 0.05
    assert abs(drawn.std().item() - 1) < 0.05


def test_no_images_for_no_labels(trained: TrainedModel) -> None:
    assert sample_images(trained, torch.empty(0, dtype=torch.int64), Sampler()).shape == (
        0,
        3,
        16,
        16,
    )


def test_labels_out_of_range_are_named(trained: TrainedModel) -> None:
    for label in (7, -1):
        with pytest.raises(ValueError, match=rf"labels: got {label}, expected 0\.\.6"):
            sample_images(trained, torch.tensor([0, label]), Sampler())
    with pytest.raises(ValueError, match=r"labels: got torch\.float32"):
        sample_images(trained, torch.zeros(2), Sampler())


def test_pixel_scale_inverts_itself() -> None:
    images = torch.arange(256, dtype=torch.uint8)
    scale = PixelScale.of(images)
    values = scale.to_model(images)
    assert abs(values.mean().item()) < 1e-3
    assert abs(values.std().item() - 1) < 1e-3
    assert torch.equal(scale.to_pixels(values), images)
    assert scale.range == pytest.approx((values[0].item(), values[-1].item()))
    assert scale.to_pixels(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_draws_images_of_its_own(trained: TrainedModel, solver: Any) -> None:
    labels = torch.arange(2)
    drawn = sample_images(trained, labels, Sampler(solver=solver, steps=6, precision="fp32"))
    other = "heun" if solver == "ddim" else "ddim"
    differing = sample_images(trained, labels, Sampler(solver=other, steps=6, precision="fp32"))
    assert drawn.shape == (2, 3, 16, 16)
    assert not torch.equal(drawn, differing)


def test_guidance_settings_reach_the_model(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    images: dict[str, torch.Tensor] = {}

    def watched(model: DiMR, dtype: torch.dtype) -> InferenceDiMR:
        optimised = optimize_for_inference(model, dtype)
        optimised.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
        return optimised

    monkeypatch.setattr("dimr_fast.sampler.optimize_for_inference", watched)
    for name, settings in {
        "none": {"guidance": 0.0},
        "constant": {"guidance": 4.0},
        "power": {"guidance": 4.0, "guidance_power": 2.0},
        "never": {"guidance": 4.0, "guidance_interval": (1.5, 2.0)},
        "late": {"guidance": 4.0, "guidance_interval": (0.0, 0.6)},
    }.items():
        batches.clear()
        sampler = Sampler(steps=4, precision="fp32", **settings)  # type: ignore[arg-type]
        images[name] = sample_images(trained, torch.arange(3), sampler)
        # four times: 1, 0.75, 0.5 and 0.25
        expected = {"none": [3] * 4, "never": [3] * 4, "late": [3, 3, 6, 6]}
        assert batches == expected.get(name, [6] * 4)
    assert torch.equal(images["none"], images["never"])
    distinct = [images[name] for name in ("none", "constant", "power", "late")]
    assert len({image.numpy().tobytes() for image in distinct}) == 4


def test_power_guidance_grows_to_the_constant_one() -> None:
    constant = Sampler(guidance=0.4).guidance_at_each_time()
    power = Sampler(guidance=0.4, guidance_power=2.0).guidance_at_each_time()
    t = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    assert constant.extra(t).tolist() == pytest.approx([0.4] * 3)
    middle = 0.2 * (1 - math.cos(math.pi / 4))
    assert power.extra(t).tolist() == pytest.approx([0.0, middle, 0.4])


def test_an_image_sampler_prepares_its_model_once(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[torch.dtype] = []

    def counted(model: DiMR, dtype: torch.dtype) -> InferenceDiMR:
        built.append(dtype)
        return optimize_for_inference(model, dtype)

    monkeypatch.setattr("dimr_fast.sampler.optimize_for_inference", counted)
    sampler = Sampler(steps=2, precision="fp32", batch_size=2)
    draw = ImageSampler(trained, sampler)
    apart = torch.cat([draw(torch.arange(2)), draw(torch.arange(2, 4), first=2)])
    assert built == [torch.float32]
    assert torch.equal(apart, sample_images(trained, torch.arange(4), sampler))


def test_the_recipe_says_what_was_left_open(trained: TrainedModel) -> None:
    cpu = torch.device("cpu")
    pixels = Sampler(solver="dpm++2m").recipe(trained.scale, cpu)
    assert pixels["solver"] == "DPM-Solver++ multistep, order 2"
    assert pixels["precision"] in ("fp32", "bf16")
    assert (pixels["noise_limit"], pixels["steps"], pixels["seed"]) == (2.5, 25, 0)
    latents = Sampler().recipe(LatentScale(), cpu)
    assert (latents["noise_limit"], latents["clip"]) == ("none", "none")
    assert json.loads(json.dumps(pixels, allow_nan=False)) == pixels


@pytest.mark.parametrize(("count", "classes"), [(1, 1), (6, 3), (50, 7), (3, 10), (1003, 1000)])
def test_labels_are_balanced(count: int, classes: int) -> None:
    labels = balanced_labels(count, classes)
    assert (labels.dtype, len(labels)) == (torch.int64, count)
    found = labels.bincount(minlength=classes)
    assert len(found) == classes
    assert found.max() - found.min() <= (count % classes > 0)
    rest = labels[count // classes * classes :]
    if len(rest) > 1:  # spread evenly over the classes
        gaps = rest.diff()
        assert gaps.max() - gaps.min() <= 1
        assert 0 < classes - rest[-1] <= gaps.max() + 1


def test_labels_of_nothing_are_an_error() -> None:
    with pytest.raises(ValueError, match="got 0, 5, expected 1 or more"):
        balanced_labels(0, 5)


def config(trained: TrainedModel, folder: Path, **changes: Any) -> SampleConfig:
    """A job of 12 images in batches of 2, which writes everything into `folder`/out."""
    checkpoint = folder / "checkpoint.safetensors"
    if not checkpoint.exists():
        write(trained, checkpoint)
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
    assert (report["count"], report["classes"]) == (11, list(CLASSES))
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
    from dimr_fast import cli, sampling

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
    write(trained, parts / "other.safetensors")
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
        "dimr_fast.sampling.claim", lambda *_: (tmp_path / "out" / "images").write_text("")
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
    monkeypatch.setattr("dimr_fast.sampling.WAIT", 0.2)
    with pytest.raises(TimeoutError, match="the first process has not begun"):
        sample(config(trained, tmp_path))


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
    monkeypatch.setattr("dimr_fast.files.PATIENCE", 0.3)
    job = config(trained, tmp_path)

    def meanwhile(*_: object) -> None:
        with pytest.raises(OSError, match="another process is writing there"):
            sample(job)

    finish = sampling._finish
    monkeypatch.setattr(sampling, "_finish", lambda job: meanwhile() or finish(job))
    sample(job)
    # As a kill at the very end leaves it.
    (job.output / "parts").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        sample(job)
    assert not (job.output / "parts").exists()


def test_a_checkpoint_that_changes_while_a_job_begins_is_noticed(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dimr_fast.sampling._fingerprint", lambda model: "that of before")
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
    monkeypatch.setattr("dimr_fast.autoencoder.Autoencoder", Doubling)
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
    write(trained, tmp_path / "c.safetensors")
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


def test_a_checkpoint_gives_back_its_model(trained: TrainedModel, tmp_path: Path) -> None:
    write(trained, tmp_path / "c.safetensors")
    loaded = load_model(tmp_path / "c.safetensors")
    assert loaded.classes == CLASSES
    assert loaded.scale == trained.scale
    assert not loaded.model.training
    for name, value in trained.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)


def test_unusable_checkpoints_are_named(trained: TrainedModel, tmp_path: Path) -> None:
    missing, text, other = tmp_path / "none", tmp_path / "text", tmp_path / "other"
    text.write_text("not a checkpoint")
    save_checkpoint(other, {"weight": torch.zeros(3)}, {"config": {"channels": 1}})
    for path in (missing, text, tmp_path):
        with pytest.raises(CheckpointError, match=f"{path}: not a readable checkpoint"):
            load_model(path)
    with pytest.raises(CheckpointError, match="not a checkpoint of a DiMR model"):
        load_model(other)


def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"weight": torch.ones(3)}, {})
    with pytest.raises(TypeError):
        save_checkpoint(path, {"weight": torch.zeros(3)}, {"value": object()})
    assert torch.equal(load_checkpoint(path)[0]["weight"], torch.ones(3))
    with pytest.raises(OSError, match="none"):
        save_checkpoint(tmp_path / "none" / "c.safetensors", {"weight": torch.ones(3)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("unpickled code ran",)


def test_published_files_load_without_running_their_code(
    trained: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = trained.model.state_dict()
    torch.save(state, tmp_path / "nnet.pth")
    model = DiMR.from_preset("tiny")
    model.load_state_dict(load_published(tmp_path / "nnet.pth"), strict=True)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    torch.save({"weight": _Payload()}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"bad.pth: not a readable .pth file"):
        load_published(tmp_path / "bad.pth")
    assert "ran" not in capsys.readouterr().out
    (tmp_path / "text.pth").write_text("expected a checkpoint, got words")
    with pytest.raises(CheckpointError, match=r"text.pth: not a readable .pth file"):
        load_published(tmp_path / "text.pth")
    torch.save({"state_dict": state}, tmp_path / "nested.pth")
    with pytest.raises(CheckpointError, match=r"holds .*Dict at 'state_dict'"):
        load_published(tmp_path / "nested.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds list"):
        load_published(tmp_path / "list.pth")
