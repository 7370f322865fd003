"""Distillation as a job: trained, resumed, on two processes, sampled, shared, and refused."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dimr_fast.checkpoint import CheckpointError, load_checkpoint, load_model, save_model
from dimr_fast.cli import main
from dimr_fast.data.scaling import PixelScale
from dimr_fast.diffusion import Autoguided
from dimr_fast.sampling import ImageSampler, SampleConfig, SamplerConfig, sample, sample_images
from dimr_fast.training import CHECKPOINT, TrainConfig, distillation_config
from tests.support.models import randomised
from tests.support.paths import ROOT
from tests.support.training import same_tensors, small_run, train_on_plain_images

MANY_STEPS = SamplerConfig(
    solver="dpm++2m", spacing="log_snr", steps=8, guidance=0.0, noise_limit=9.0
)
"""The steps of the teacher that a student learns to replace."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of a model that has learned the colours of its six classes."""
    folder = tmp_path_factory.mktemp("teacher")
    train_on_plain_images(small_run(folder, steps=150, learning_rate=4e-3, warmup_steps=20))
    return folder / CHECKPOINT


def student_of(teacher: Path, output: Path, **changes: Any) -> TrainConfig:
    return small_run(
        output, **{"teacher": teacher, "init": str(teacher), "label_dropout": 0.0} | changes
    )


def test_a_student_draws_in_two_steps_what_its_teacher_draws_in_many(
    teacher: Path, tmp_path: Path
) -> None:
    settings = student_of(teacher, tmp_path / "run", steps=200, learning_rate=2e-3)
    summary = train_on_plain_images(settings)
    assert summary.last_loss < 0.9 * summary.first_loss

    labels = torch.arange(6).repeat_interleave(8)
    trained = load_model(teacher)
    goal = sample_images(trained, labels, MANY_STEPS).float()
    two = dataclasses.replace(MANY_STEPS, solver="ddim", steps=2)
    before = (sample_images(trained, labels, two).float() - goal).square().mean().sqrt()

    student = load_model(tmp_path / "run" / CHECKPOINT)
    assert student.evaluations == 2
    drawn = sample_images(student, labels, SamplerConfig(noise_limit=9.0)).float()
    after = (drawn - goal).square().mean().sqrt()
    print(f"pixels from the teacher's: {before:.1f} untrained, {after:.1f} distilled")
    assert after < 0.7 * before


@pytest.fixture(scope="module")
def guide(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a worse model than the teacher: its weights, made smaller."""
    folder = tmp_path_factory.mktemp("guide") / "worse"
    trained = load_model(teacher)
    with torch.no_grad():
        for parameter in trained.model.parameters():
            parameter.mul_(0.95)
    save_model(trained, folder)
    return folder


def test_a_student_learns_what_its_teacher_draws_under_guidance_by_a_worse_model(
    teacher: Path, guide: Path, tmp_path: Path
) -> None:
    labels = torch.arange(6).repeat_interleave(8)
    draw, worse = (ImageSampler(load_model(path), MANY_STEPS) for path in (teacher, guide))
    draw.network = Autoguided(draw.network, worse.network, strength=2.0)
    goal = draw(labels).float()
    distances = {}
    for name, changes in (
        ("guided", {"teacher_guide": guide, "teacher_guidance": 2.0}),
        ("unguided", {}),
    ):
        settings = student_of(teacher, tmp_path / name, steps=200, learning_rate=2e-3, **changes)
        train_on_plain_images(settings)
        student = load_model(settings.output / CHECKPOINT)
        drawn = sample_images(student, labels, SamplerConfig(noise_limit=9.0)).float()
        distances[name] = (drawn - goal).square().mean().sqrt()
    print(f"pixels from the guided teacher's: {distances}")
    assert distances["guided"] < 0.85 * distances["unguided"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    teacher: Path, tmp_path: Path, precision: str
) -> None:
    def interrupt(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    changes = {"precision": precision, "accumulation": 2}
    train_on_plain_images(student_of(teacher, tmp_path / "whole", **changes))
    stopped = train_on_plain_images(student_of(teacher, tmp_path / "parts", **changes), interrupt)
    assert stopped.steps == 3
    # The teacher may have moved.
    moved = Path(shutil.copy(teacher, tmp_path / "moved.safetensors"))
    settings = dataclasses.replace(
        student_of(teacher, tmp_path / "parts", **changes), teacher=moved
    )
    train_on_plain_images(settings, resume=True)
    assert same_tensors(tmp_path / "whole", tmp_path / "parts")


def test_previews_and_an_exported_folder_know_the_number_of_evaluations(
    teacher: Path, tmp_path: Path
) -> None:
    settings = student_of(teacher, tmp_path / "run", evaluations=1, sample_steps=8, data="tiles")
    train_on_plain_images(settings)
    assert (tmp_path / "run" / "samples" / "00000008.png").stat().st_size > 0
    words = ["--checkpoint", tmp_path / "run" / CHECKPOINT, "--output", tmp_path / "model"]
    assert main(["export", *map(str, words)]) == 0
    shared = load_model(tmp_path / "model")
    assert shared.evaluations == 1
    card = (tmp_path / "model" / "README.md").read_text()
    assert "it draws an image in 1 network evaluation, without guidance" in card
    save_model(shared, tmp_path / "again")
    assert load_model(tmp_path / "again").evaluations == 1
    paths = sample(SampleConfig(checkpoint=tmp_path / "again", output=tmp_path / "out"))
    assert all(path.exists() for path in paths)


def test_a_student_of_an_earlier_method_is_refused(teacher: Path, tmp_path: Path) -> None:
    save_model(dataclasses.replace(load_model(teacher), evaluations=2), tmp_path / "student")
    config = tmp_path / "student" / "config.json"
    written = json.loads(config.read_text())
    del written["intervals"]
    config.write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match="method of an earlier version; distil its teacher"):
        load_model(tmp_path / "student")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": 4}, "steps: got 4, expected 2: the model was distilled for 2 evaluations"),
        ({"guidance": 1.0}, "guidance: got 1.0, expected 0.0"),
        ({"solver": "dpm++"}, "solver: got 'dpm.*', expected ddim"),
        ({"spacing": "time"}, "spacing: got 'time', expected log_snr"),
        ({"defaults": "published"}, "defaults: got 'published', expected None"),
    ],
)
def test_a_distilled_model_refuses_other_settings(
    teacher: Path, settings: dict[str, Any], named: str
) -> None:
    trained = dataclasses.replace(load_model(teacher), evaluations=2)
    with pytest.raises(ValueError, match=named):
        sample_images(trained, torch.tensor([0]), SamplerConfig(**settings))
    same = SamplerConfig(solver="ddim", steps=2, guidance=0.0)
    assert sample_images(trained, torch.tensor([0]), same).shape == (1, 3, 16, 16)


def test_unusable_teachers_are_refused_before_any_work(teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = load_model(teacher)
    save_model(dataclasses.replace(trained, classes=tuple("ABCDEF")), tmp_path / "others")
    with pytest.raises(ValueError, match=r"teacher: .*others has the classes .*'A'.*'a'"):
        train_on_plain_images(student_of(tmp_path / "others", run, init=None))
    with pytest.raises(ValueError, match=r"teacher: .* has the schedule discrete, .* vp-sde"):
        train_on_plain_images(student_of(teacher, run, schedule="vp-sde", init=None))
    save_model(dataclasses.replace(trained, scale=PixelScale(0.0, 1.0)), tmp_path / "scaled")
    save_model(dataclasses.replace(trained, evaluations=1), tmp_path / "student")
    with pytest.raises(ValueError, match=r"teacher: .*student is distilled itself"):
        train_on_plain_images(student_of(tmp_path / "student", run))
    with pytest.raises(CheckpointError, match="nowhere"):
        train_on_plain_images(student_of(tmp_path / "nowhere", run, init=None))
    for changes, named in (
        ({"evaluations": 0}, "evaluations: got 0"),
        (
            {"teacher_steps": 5},
            "teacher_steps: got 5, expected a positive multiple of",
        ),
        ({"teacher_guidance": -2.0}, "teacher_guidance: got -2.0"),
        ({"teacher_guide": teacher}, "teacher_guidance: got 0.0, .* not 0 with teacher_guide"),
        (
            {"teacher_guide": tmp_path / "others", "teacher_guidance": 1.0},
            r"teacher_guide: .*others has the classes .*'A'.*'a'",
        ),
        (
            {"teacher_guide": tmp_path / "student", "teacher_guidance": 1.0},
            r"teacher_guide: .*student is distilled itself",
        ),
        (
            {"teacher_guide": tmp_path / "scaled", "teacher_guidance": 1.0},
            r"teacher_guide: .*scaled has the scale PixelScale\(mean=0.0, std=1.0\)",
        ),
        ({"teacher": None, "teacher_guide": teacher}, "teacher_guide: got .*none without"),
    ):
        with pytest.raises(ValueError, match=named):
            train_on_plain_images(student_of(**{"teacher": teacher, "output": run} | changes))
    assert not run.exists()


def test_another_guide_or_none_does_not_resume_a_run(
    teacher: Path, guide: Path, tmp_path: Path
) -> None:
    settings = student_of(
        teacher, tmp_path / "run", steps=2, teacher_guide=guide, teacher_guidance=1.0
    )
    train_on_plain_images(settings)
    for other in (teacher, None):
        with pytest.raises(CheckpointError, match="was trained with teacher_guide"):
            train_on_plain_images(dataclasses.replace(settings, teacher_guide=other), resume=True)
    moved = Path(shutil.copytree(guide, tmp_path / "moved"))
    again = dataclasses.replace(settings, teacher_guide=moved, steps=3)
    assert train_on_plain_images(again, resume=True).steps == 3


def test_another_teacher_or_none_does_not_resume_a_run(teacher: Path, tmp_path: Path) -> None:
    settings = student_of(teacher, tmp_path / "run", steps=2)
    train_on_plain_images(settings)
    trained = load_model(teacher)
    randomised(trained.model)
    save_model(trained, tmp_path / "other")
    for other in (tmp_path / "other", None):
        with pytest.raises(CheckpointError, match="was trained with teacher"):
            train_on_plain_images(dataclasses.replace(settings, teacher=other), resume=True)


def test_settings_are_made_from_the_teacher(teacher: Path, tmp_path: Path) -> None:
    found = distillation_config(teacher, tmp_path / "run", ["evaluations=4", "minutes=2"])
    assert (found.teacher, found.init, found.preset) == (teacher, str(teacher), "tiny")
    assert (found.evaluations, found.minutes, found.label_dropout) == (4, 2.0, 0.0)
    packaged = distillation_config(None, tmp_path / "run", guide=teacher)
    assert (packaged.preset, packaged.teacher_guide) == ("demo", teacher)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_the_command_distils_on_two_processes_and_resumes(tmp_path: Path, sharding: str) -> None:
    """The packaged model, with the settings of the recipe: the same losses as on one process."""
    words = ["--set", "minutes=none", "--set", "steps=4", "--set", "precision=fp32"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["distill", "--output", str(one), *words]) == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "dimr_fast", "distill", "--output", str(two)]
    run = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run([*command, *words, "--set", f"sharding={sharding}"], **run)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [load_checkpoint(folder / CHECKPOINT)[0]["losses"] for folder in (one, two)]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
    done = subprocess.run([*command, "--resume", "--set", "steps=6"], **run)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(load_checkpoint(two / CHECKPOINT)[0]["losses"]) == 6
