"""Training as a user runs it: the loss falls, an interrupted run goes on, nothing is lost."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dimr_fast import DiMR
from dimr_fast.checkpoint import CheckpointError, load_checkpoint, load_model
from dimr_fast.data import sources
from dimr_fast.data.tiles import Tiles
from dimr_fast.training import TrainConfig, train
from dimr_fast.training import loop as train_loop
from dimr_fast.training import run as training
from dimr_fast.training import state as train_state
from dimr_fast.training.loop import MAX_SKIPPED_STEPS, NONFINITE, TrainLoop, learning_rate
from dimr_fast.training.state import CHECKPOINT, milestones


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training needs labelled images only; these have one plain colour a class."""
    labels = torch.arange(60) % 6
    images = (labels * 40).to(torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16).contiguous()
    corners = torch.zeros(60, 2, dtype=torch.int64)
    tiles = Tiles(images, labels, corners, images, labels, corners)
    monkeypatch.setattr(sources, "load_tiles", lambda size, stride: tiles)


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
    assert names == {CHECKPOINT, "loss.png", "train.json", "config.yaml", "log.jsonl", ".lock"}
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
    original = TrainLoop._micro_batches
    calls = 0

    def interrupting(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(TrainLoop, "_micro_batches", interrupting)
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
        patch.setattr(TrainLoop, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path / "parts"))
    train(config(tmp_path / "parts"), resume=True)
    assert same_tensors(tmp_path / "whole", tmp_path / "parts")


def test_a_run_killed_in_its_first_checkpoint_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, *args: Any) -> None:
        path.with_name(f".{path.name}.1.part").write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_state, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path, steps=1))
    train(config(tmp_path, steps=1))
    assert not list(tmp_path.glob(".*.part"))


def test_training_works_outside_the_main_thread(tmp_path: Path) -> None:
    found: list[int] = []
    run = config(tmp_path / "run", steps=2)
    thread = threading.Thread(target=lambda: found.append(train(run).steps))
    thread.start()
    thread.join()
    assert found == [2]


def test_dropped_labels_are_the_null_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = TrainLoop._micro_batches

    def watching(*args: Any) -> Any:
        for part in original(*args):
            seen.extend(part[1].tolist())
            yield part

    monkeypatch.setattr(TrainLoop, "_micro_batches", watching)
    train(config(tmp_path, batch_size=60, steps=10, label_dropout=0.25))
    dropped = seen.count(6) / 600
    assert set(seen) == {0, 1, 2, 3, 4, 5, 6}
    assert 0.18 < dropped < 0.32


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
    initial = DiMR.from_preset("tiny").state_dict()
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


def test_a_run_that_another_process_goes_on_with_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dimr_fast.utils.files.LOCK_TIMEOUT", 0.5)
    train(config(tmp_path, steps=1))
    before = (tmp_path / CHECKPOINT).read_bytes()
    code = "from dimr_fast.utils.files import lock_folder; from pathlib import Path\n"
    code += "import sys, time\n"
    code += "held = lock_folder(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(OSError, match="another process is writing there"):
            train(config(tmp_path), resume=True)
        assert (tmp_path / CHECKPOINT).read_bytes() == before
        other.kill()
    assert train(config(tmp_path), resume=True).steps == 8


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
    original = train_loop.multi_scale_loss
    calls = 0

    def failing(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*args) * (float("nan") if calls == 3 else 1.0)

    monkeypatch.setattr(train_loop, "multi_scale_loss", failing)
    with pytest.raises(FloatingPointError, match=r"loss nan, .* at step 3"):
        train(config(tmp_path))
    assert all(p.isfinite().all() for p in load_model(tmp_path / CHECKPOINT).model.parameters())


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of that step is finite; the update would spoil every weight."""
    original = train_loop.multi_scale_loss
    calls = 0

    def poisoned(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = original(*args)
        if calls == 3:
            loss.register_hook(lambda grad: grad * float("nan"))
        return loss

    monkeypatch.setattr(train_loop, "multi_scale_loss", poisoned)
    with pytest.raises(FloatingPointError, match=r"gradient norm nan at step 3"):
        train(config(tmp_path, checkpoint_minutes=1e-9))
    assert load_checkpoint(tmp_path / CHECKPOINT)[1]["step"] == 2
    assert all(p.isfinite().all() for p in load_model(tmp_path / CHECKPOINT).model.parameters())


def test_the_ema_keeps_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one, every step would stay in memory for the rest of the run."""
    loops: list[TrainLoop] = []
    original = TrainLoop.run

    def watching(loop: TrainLoop, *args: Any) -> bool:
        loops.append(loop)
        return original(loop, *args)

    monkeypatch.setattr(TrainLoop, "run", watching)
    train(config(tmp_path))
    assert not any(value.requires_grad for value in loops[0].state.ema.tensors.values())


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 4}, {"precision": "bf16"}])
def test_a_run_goes_on_with_its_own_recipe_only(tmp_path: Path, change: dict[str, Any]) -> None:
    train(config(tmp_path, steps=1))
    (name,) = change
    with pytest.raises(CheckpointError, match=f"was trained with {name}"):
        train(config(tmp_path, **change), resume=True)
    # What the machine would choose by itself gives way to what the run began with.
    assert train(config(tmp_path, precision="auto"), resume=True).precision == "fp32"


def test_a_run_goes_on_with_the_same_images_wherever_they_are(tmp_path: Path) -> None:
    images = tmp_path / "images"
    generator = torch.Generator().manual_seed(0)
    for name in ("dark", "light"):
        (images / name).mkdir(parents=True)
        for number in range(4):
            pixels = torch.randint(0, 255, (16, 16, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(images / name / f"{number}.png")
    before = config(tmp_path / "run", data=str(images), steps=2)
    train(before)
    moved = dataclasses.replace(before, data=str(images.rename(tmp_path / "moved")), steps=3)
    assert train(moved, resume=True).steps == 3
    shutil.copy(tmp_path / "moved" / "dark" / "0.png", tmp_path / "moved" / "dark" / "more.png")
    with pytest.raises(CheckpointError, match=r"trained with data 8 examples.*not 9 examples"):
        train(dataclasses.replace(moved, steps=4), resume=True)


def test_an_unwritable_output_fails_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        train(config(tmp_path / "file" / "run"))
    with pytest.raises(FileNotFoundError, match="data: got 'cats'"):
        train(config(tmp_path / "run", data="cats"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": None}, "minutes: got None"),
        ({"minutes": -1.0}, "minutes: got -1.0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0"),
        ({"betas": (0.9, 1.0)}, "betas: got"),
        ({"weight_decay": -1.0}, "weight_decay: got -1.0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: got -1.0"),
        ({"checkpoint_minutes": 0.0}, "checkpoint_minutes: got 0.0"),
        ({"ema_decay": 1.0}, "ema_decay: got 1.0"),
        ({"accumulation": 3}, "batch_size: got 8, expected a multiple of 3"),
        ({"checkpointing": (3,)}, "checkpointing: got branch 3"),
        ({"image_size": 0}, "image_size: got 0"),
        ({"sharding": "fsdp2"}, "sharding: got 'fsdp2' on one process"),
        ({"sharding": "fsdp2", "precision": "fp16"}, "sharding: got 'fsdp2', expected none with"),
        ({"score_images": 1}, "score_images: got 1"),
        ({"nonfinite": "ignore"}, "nonfinite: got 'ignore', expected one of stop, skip"),
        ({"precision": "fp8"}, "precision: got 'fp8', expected one of auto, fp32"),
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


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_accumulated_parts_and_recomputed_activations_change_rounding_only(tmp_path: Path) -> None:
    train(config(tmp_path / "whole"))
    train(config(tmp_path / "parts", accumulation=4, checkpointing=(0, 2)))
    whole, metadata = load_checkpoint(tmp_path / "whole" / CHECKPOINT)
    parts, other = load_checkpoint(tmp_path / "parts" / CHECKPOINT)
    torch.testing.assert_close(parts["losses"], whole["losses"], rtol=1e-4, atol=1e-5)
    # How it was computed is not part of what was trained.
    assert other["config"] == metadata["config"]
    assert other["recipe"] == metadata["recipe"]


def test_fp16_scales_its_loss_and_goes_on_exactly(tmp_path: Path) -> None:
    settings = {"precision": "fp16", "learning_rate": 3e-3}
    whole = train(config(tmp_path / "whole", steps=40, **settings))
    assert whole.precision == "fp16"
    assert whole.last_loss < whole.first_loss
    train(config(tmp_path / "parts", steps=17, decay=0.0, **settings))
    _, metadata = load_checkpoint(tmp_path / "parts" / CHECKPOINT)
    assert metadata["scaler"]["scale"] > 0
    train(config(tmp_path / "parts", steps=25, decay=0.0, **settings), resume=True)
    train(config(tmp_path / "once", steps=25, decay=0.0, **settings))
    assert same_tensors(tmp_path / "parts", tmp_path / "once")


def poison(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    original = train_loop.multi_scale_loss
    count = 0

    def poisoned(*args: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return original(*args) * (float("nan") if count in calls else 1.0)

    monkeypatch.setattr(train_loop, "multi_scale_loss", poisoned)


def test_what_led_to_a_loss_that_is_not_finite_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {3})
    with pytest.raises(FloatingPointError, match=str(tmp_path / NONFINITE)):
        train(config(tmp_path, checkpoint_minutes=1e-9))
    tensors, metadata = load_checkpoint(tmp_path / NONFINITE)
    assert (metadata["step"], metadata["loss"]) == (2, "nan")
    assert tensors["input.x0"].shape == (8, 3, 16, 16)
    assert tensors["input.indices"].tolist() == train_loop_indices(step=2)
    state, _ = load_checkpoint(tmp_path / CHECKPOINT)
    assert all(torch.equal(tensors[name], state[name]) for name in state)


def train_loop_indices(step: int) -> list[int]:
    from dimr_fast.data.loader import batch_indices

    return batch_indices(60, 8, 0, step).tolist()


def test_a_step_that_is_not_finite_can_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {3, 5})
    summary = train(config(tmp_path, nonfinite="skip"))
    assert summary.steps == 8
    tensors, _ = load_checkpoint(tmp_path / CHECKPOINT)
    assert tensors["losses"].isnan().nonzero().flatten().tolist() == [2, 4]
    assert all(p.isfinite().all() for p in load_model(tmp_path / CHECKPOINT).model.parameters())
    assert next(v for name, v in tensors.items() if name.startswith("optimizer.step")) == 6


def test_too_many_steps_left_out_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, set(range(4, 99)))
    with pytest.raises(FloatingPointError, match=f"at step 13, the {MAX_SKIPPED_STEPS}th in a row"):
        train(config(tmp_path, steps=30, nonfinite="skip"))


@pytest.mark.parametrize("links", [True, False])
def test_milestones_stay_and_the_oldest_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def without_links(*args: Any) -> None:
        raise OSError("a file system without links")

    if not links:
        monkeypatch.setattr("os.link", without_links)
    train(config(tmp_path, milestone_steps=2, milestones=3))
    kept = milestones(tmp_path / CHECKPOINT)
    assert [step for step, _ in kept] == [4, 6, 8]
    assert [load_checkpoint(path)[1]["step"] for _, path in kept] == [4, 6, 8]


def test_a_milestone_that_a_kill_prevented_is_made_up_for(tmp_path: Path) -> None:
    train(config(tmp_path, steps=4, milestone_steps=4))
    ((_, path),) = milestones(tmp_path / CHECKPOINT)
    path.unlink()
    train(config(tmp_path, steps=6, milestone_steps=4), resume=True)
    assert [load_checkpoint(path)[1]["step"] for _, path in milestones(tmp_path / CHECKPOINT)] == [
        4
    ]


def test_a_damaged_checkpoint_is_noticed_and_the_milestone_named(tmp_path: Path) -> None:
    train(config(tmp_path, milestone_steps=4))
    path = tmp_path / CHECKPOINT
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.unlink()  # the newest milestone is the same file
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged.*to go on from checkpoint-00000008"):
        train(config(tmp_path, steps=9), resume=True)
    assert path.read_bytes() == content
    newest = tmp_path / "checkpoint-00000008.safetensors"
    newest.unlink()
    os.link(path, newest)  # as it is until the checkpoint is written anew
    with pytest.raises(CheckpointError, match=r"is damaged.*to go on from checkpoint-00000004"):
        train(config(tmp_path, steps=9), resume=True)


def test_milestones_of_a_run_that_was_taken_back_push_out_none_of_the_new(tmp_path: Path) -> None:
    train(config(tmp_path, steps=8, milestone_steps=2, milestones=2))
    path = tmp_path / CHECKPOINT
    path.unlink()
    shutil.copy(tmp_path / "checkpoint-00000006.safetensors", path)
    (tmp_path / "checkpoint-00000006.safetensors").rename(
        tmp_path / "checkpoint-00000099.safetensors"
    )
    train(config(tmp_path, steps=8, milestone_steps=1, milestones=2), resume=True)
    assert [step for step, _ in milestones(path)] == [7, 8, 99]


def test_resuming_waits_for_a_checkpoint_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(tmp_path, steps=3))
    kept = tmp_path / "three.safetensors"
    (tmp_path / CHECKPOINT).rename(kept)
    train(config(tmp_path / "less", steps=1))
    (tmp_path / "less" / CHECKPOINT).rename(tmp_path / CHECKPOINT)

    def lock_folder(folder: Path) -> AbstractContextManager[None]:
        """The run before writes its last checkpoint and releases the lock."""
        kept.replace(folder / CHECKPOINT)
        return nullcontext()

    monkeypatch.setattr(training, "lock_folder", lock_folder)
    train(config(tmp_path, steps=3), resume=True)
    assert load_checkpoint(tmp_path / CHECKPOINT)[1]["step"] == 3
    report = json.loads((tmp_path / "train.json").read_text())
    assert report["result"]["steps"] == 3
    assert not report["result"]["interrupted"]


def test_the_log_has_a_line_every_so_often_and_none_twice(tmp_path: Path) -> None:
    train(config(tmp_path, log_steps=2, tensorboard=True))
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8]
    assert {"loss", "gradient_norm", "learning_rate", "images_per_second", "mfu"} <= set(
        lines(tmp_path)[0]
    )
    assert all(0 < line["mfu"] < 1 for line in lines(tmp_path))
    assert list((tmp_path / "tensorboard").iterdir())
    # As after a full disk and a kill: a line within another, some past the checkpoint, one cut.
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "lo{"step": 8, "loss": 1.0}\n{"step": 10, "loss": 1.0}\n{"step": 1')
    train(config(tmp_path, steps=12, log_steps=2, tensorboard=True), resume=True)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8, 10, 12]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in events] == [2, 4, 6, 8, 10, 12]


def test_what_cannot_be_logged_or_drawn_is_reported_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = TrainLoop._forward_backward

    def without_room(*args: Any) -> Any:
        if not (tmp_path / "samples").exists():
            (tmp_path / "samples").write_text("a file where a folder is to be")
            (tmp_path / "log.jsonl").unlink()
            (tmp_path / "log.jsonl").mkdir()
        return original(*args)

    monkeypatch.setattr(TrainLoop, "_forward_backward", without_room)
    assert train(config(tmp_path, steps=2, log_steps=2, sample_steps=2)).steps == 2
    said = capsys.readouterr()
    assert "not logged: " in said.out + said.err
    assert "no samples at step 2: " in said.out + said.err


def test_a_batch_that_cannot_be_kept_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {3})

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(train_loop, "save_checkpoint", full)
    with pytest.raises(FloatingPointError, match=r"loss nan, .* could not be written \(no space"):
        train(config(tmp_path))


def test_a_run_goes_on_with_the_classes_and_the_scale_it_began_with(tmp_path: Path) -> None:
    for name, level in (("cats", 60), ("dogs", 180)):
        (tmp_path / "images" / name).mkdir(parents=True)
        picture = Image.new("RGB", (16, 16), (level, 0, 0))
        picture.save(tmp_path / "images" / name / "0.png")
    run = config(tmp_path / "run", data=str(tmp_path / "images"), image_size=16, steps=1)
    train(run)
    scale = load_model(tmp_path / "run" / CHECKPOINT).scale
    Image.new("RGB", (16, 16), (250, 0, 0)).save(tmp_path / "images" / "dogs" / "0.png")
    train(dataclasses.replace(run, steps=2), resume=True)
    assert load_model(tmp_path / "run" / CHECKPOINT).scale == scale
    (tmp_path / "images" / "cats").rename(tmp_path / "images" / "eels")
    with pytest.raises(CheckpointError, match="trained with classes cats, dogs, not dogs, eels"):
        train(dataclasses.replace(run, steps=3), resume=True)


def test_samples_and_scores_come_on_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the feature network's package")
    from dimr_fast.evaluation import real_images

    monkeypatch.setattr(real_images, "load_tiles", lambda size: sources.load_tiles(size, 16))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train(config(tmp_path, steps=4, sample_steps=2, score_steps=4, score_images=8))
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "00000002.png",
        "00000004.png",
    ]
    (score,) = [line for line in lines(tmp_path) if "frechet_distance" in line]
    assert score["step"] == 4
    assert score["frechet_distance"] > 0

    # As a kill leaves it that comes after the checkpoint.
    (tmp_path / "samples" / "00000004.png").unlink()
    log = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_text("".join(line for line in log if "frechet" not in line))
    train(config(tmp_path, steps=5, sample_steps=2, score_steps=4, score_images=8), resume=True)
    assert (tmp_path / "samples" / "00000004.png").exists()
    assert [line for line in lines(tmp_path) if "frechet_distance" in line] == [score]
