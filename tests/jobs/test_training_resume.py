"""Resuming a run: it continues bit for bit, from its own recipe, data and checkpoint only."""

import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dimr_fast.checkpoint import CheckpointError, load_checkpoint, load_model
from dimr_fast.training import CHECKPOINT, train
from dimr_fast.training.state import milestones
from dimr_fast.utils.files import lock_folder
from tests.support.files import file_size_limit
from tests.support.training import same_tensors, small_run, train_on_plain_images


@pytest.mark.parametrize("changes", [{}, {"half_log_snr": (0.5, 1.2), "min_snr": 5.0}])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    def interrupt(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    train_on_plain_images(small_run(tmp_path / "whole", **changes))
    stopped = train_on_plain_images(small_run(tmp_path / "parts", **changes), interrupt)
    assert stopped.interrupted
    assert stopped.steps == 3
    resumed = train_on_plain_images(small_run(tmp_path / "parts", **changes), resume=True)
    assert resumed.steps == 8
    assert same_tensors(tmp_path / "whole", tmp_path / "parts")


def test_a_run_interrupted_before_its_first_step_resumes(tmp_path: Path) -> None:
    def interrupt(step: int) -> None:
        raise KeyboardInterrupt

    train_on_plain_images(small_run(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train_on_plain_images(small_run(tmp_path / "parts"), interrupt)
    assert load_checkpoint(tmp_path / "parts" / CHECKPOINT)[1]["step"] == 0
    train_on_plain_images(small_run(tmp_path / "parts"), resume=True)
    assert same_tensors(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_wrote_no_first_checkpoint_can_be_started_again(tmp_path: Path) -> None:
    with file_size_limit(10_000), pytest.raises(OSError, match=CHECKPOINT):
        train_on_plain_images(small_run(tmp_path, steps=1))
    # A killed process leaves an unfinished file behind.
    (tmp_path / f".{CHECKPOINT}.1.part").write_bytes(b"half of it")
    train_on_plain_images(small_run(tmp_path, steps=1))
    assert not list(tmp_path.glob(".*.part"))


def test_resuming_needs_a_complete_checkpoint_of_the_same_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        train_on_plain_images(small_run(tmp_path), resume=True)
    train_on_plain_images(small_run(tmp_path, steps=1))
    with pytest.raises(CheckpointError, match="model configuration differs"):
        train_on_plain_images(small_run(tmp_path, preset="demo"), resume=True)
    path = tmp_path / CHECKPOINT
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(half)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        train_on_plain_images(small_run(tmp_path), resume=True)
    assert path.read_bytes() == half


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 4}, {"precision": "bf16"}])
def test_a_run_resumes_with_its_own_recipe_only(tmp_path: Path, change: dict[str, Any]) -> None:
    train_on_plain_images(small_run(tmp_path, steps=1))
    (name,) = change
    with pytest.raises(CheckpointError, match=f"was trained with {name}"):
        train_on_plain_images(small_run(tmp_path, **change), resume=True)
    # With "auto" the run keeps its precision, whatever this machine would choose.
    automatic = small_run(tmp_path, precision="auto")
    assert train_on_plain_images(automatic, resume=True).precision == "fp32"


def test_a_run_resumes_with_the_same_images_in_another_folder(tmp_path: Path) -> None:
    images = tmp_path / "images"
    generator = torch.Generator().manual_seed(0)
    for name in ("dark", "light"):
        (images / name).mkdir(parents=True)
        for number in range(4):
            pixels = torch.randint(0, 255, (16, 16, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(images / name / f"{number}.png")
    before = small_run(tmp_path / "run", data=str(images), steps=2)
    train(before)
    moved = dataclasses.replace(before, data=str(images.rename(tmp_path / "moved")), steps=3)
    assert train(moved, resume=True).steps == 3
    shutil.copy(tmp_path / "moved" / "dark" / "0.png", tmp_path / "moved" / "dark" / "more.png")
    with pytest.raises(CheckpointError, match=r"trained with data 8 examples.*not 9 examples"):
        train(dataclasses.replace(moved, steps=4), resume=True)


def test_a_run_keeps_the_classes_and_the_scale_of_its_first_images(tmp_path: Path) -> None:
    for name, level in (("cats", 60), ("dogs", 180)):
        (tmp_path / "images" / name).mkdir(parents=True)
        picture = Image.new("RGB", (16, 16), (level, 0, 0))
        picture.save(tmp_path / "images" / name / "0.png")
    run = small_run(tmp_path / "run", data=str(tmp_path / "images"), image_size=16, steps=1)
    train(run)
    scale = load_model(tmp_path / "run" / CHECKPOINT).scale
    Image.new("RGB", (16, 16), (250, 0, 0)).save(tmp_path / "images" / "dogs" / "0.png")
    train(dataclasses.replace(run, steps=2), resume=True)
    assert load_model(tmp_path / "run" / CHECKPOINT).scale == scale
    (tmp_path / "images" / "cats").rename(tmp_path / "images" / "eels")
    with pytest.raises(CheckpointError, match="trained with classes cats, dogs, not dogs, eels"):
        train(dataclasses.replace(run, steps=3), resume=True)


def test_resuming_waits_for_a_checkpoint_that_is_being_written(tmp_path: Path) -> None:
    """Another process holds the lock until it has written its last checkpoint, of step 3."""
    train_on_plain_images(small_run(tmp_path, steps=3))
    last = tmp_path / "three.safetensors"
    (tmp_path / CHECKPOINT).rename(last)
    train_on_plain_images(small_run(tmp_path / "less", steps=1))
    (tmp_path / "less" / CHECKPOINT).rename(tmp_path / CHECKPOINT)
    locked = threading.Event()

    def write_last_checkpoint() -> None:
        with lock_folder(tmp_path):
            locked.set()
            time.sleep(1)
            last.replace(tmp_path / CHECKPOINT)

    other = threading.Thread(target=write_last_checkpoint)
    other.start()
    locked.wait()
    train_on_plain_images(small_run(tmp_path, steps=3), resume=True)
    other.join()
    assert load_checkpoint(tmp_path / CHECKPOINT)[1]["step"] == 3
    report = json.loads((tmp_path / "train.json").read_text())
    assert report["result"]["steps"] == 3
    assert not report["result"]["interrupted"]


@pytest.mark.parametrize("links", [True, False])
def test_the_newest_milestones_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def without_links(*args: Any) -> None:
        raise OSError("a file system without links")

    if not links:
        monkeypatch.setattr("os.link", without_links)
    train_on_plain_images(small_run(tmp_path, milestone_steps=2, milestones=3))
    kept = milestones(tmp_path / CHECKPOINT)
    assert [step for step, _ in kept] == [4, 6, 8]
    assert [load_checkpoint(path)[1]["step"] for _, path in kept] == [4, 6, 8]


def test_a_milestone_that_a_kill_prevented_is_written_on_resuming(tmp_path: Path) -> None:
    train_on_plain_images(small_run(tmp_path, steps=4, milestone_steps=4))
    ((_, path),) = milestones(tmp_path / CHECKPOINT)
    path.unlink()
    train_on_plain_images(small_run(tmp_path, steps=6, milestone_steps=4), resume=True)
    found = [load_checkpoint(path)[1]["step"] for _, path in milestones(tmp_path / CHECKPOINT)]
    assert found == [4]


def test_a_damaged_checkpoint_is_detected_and_the_newest_milestone_named(tmp_path: Path) -> None:
    train_on_plain_images(small_run(tmp_path, milestone_steps=4))
    path = tmp_path / CHECKPOINT
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.unlink()  # the newest milestone is a link to this file
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged.*to resume .* copy checkpoint-00000008"):
        train_on_plain_images(small_run(tmp_path, steps=9), resume=True)
    assert path.read_bytes() == content
    newest = tmp_path / "checkpoint-00000008.safetensors"
    newest.unlink()
    os.link(path, newest)  # as it is until the next checkpoint is written
    with pytest.raises(CheckpointError, match=r"is damaged.*to resume .* copy checkpoint-00000004"):
        train_on_plain_images(small_run(tmp_path, steps=9), resume=True)


def test_after_going_back_to_a_milestone_later_ones_do_not_count(tmp_path: Path) -> None:
    train_on_plain_images(small_run(tmp_path, steps=8, milestone_steps=2, milestones=2))
    path = tmp_path / CHECKPOINT
    path.unlink()
    shutil.copy(tmp_path / "checkpoint-00000006.safetensors", path)
    (tmp_path / "checkpoint-00000006.safetensors").rename(
        tmp_path / "checkpoint-00000099.safetensors"
    )
    again = small_run(tmp_path, steps=8, milestone_steps=1, milestones=2)
    train_on_plain_images(again, resume=True)
    assert [step for step, _ in milestones(path)] == [7, 8, 99]
