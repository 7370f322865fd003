"""Training as a user runs it: its result, its settings and its errors."""

import dataclasses
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from dimr_fast import DiMR
from dimr_fast.checkpoint import load_checkpoint
from dimr_fast.training import CHECKPOINT, train
from dimr_fast.training.loop import learning_rate
from tests.support.training import same_tensors, small_run, train_on_plain_images


def test_the_loss_falls_and_all_files_are_written(tmp_path: Path) -> None:
    summary = train_on_plain_images(small_run(tmp_path / "run", steps=60, learning_rate=3e-3))
    assert summary.steps == 60
    assert summary.last_loss < 0.8 * summary.first_loss
    assert not summary.interrupted
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {CHECKPOINT, "loss.png", "train.json", "config.yaml", "log.jsonl", ".lock"}
    report = json.loads((tmp_path / "run" / "train.json").read_text())
    assert report["result"]["steps"] == 60
    assert report["config"]["preset"] == "tiny"


def test_training_works_outside_the_main_thread(tmp_path: Path) -> None:
    found: list[int] = []
    run = small_run(tmp_path / "run", steps=2)
    thread = threading.Thread(target=lambda: found.append(train_on_plain_images(run).steps))
    thread.start()
    thread.join()
    assert found == [2]


def test_the_default_dtype_does_not_change_that_of_the_weights(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        train_on_plain_images(small_run(tmp_path / "run", steps=2, sample_steps=2))
    finally:
        torch.set_default_dtype(torch.float32)
    tensors, _ = load_checkpoint(tmp_path / "run" / CHECKPOINT)
    assert {value.dtype for name, value in tensors.items() if name != "losses"} == {torch.float32}
    assert (tmp_path / "run" / "samples" / "00000002.png").exists()


def test_dropped_labels_become_the_null_class(tmp_path: Path) -> None:
    seen: list[int] = []

    def watch(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, nn.Embedding) and module.num_embeddings == 7:
            labels = inputs[0]
            if not labels.is_meta:  # FLOPs are counted with tensors without values
                seen.extend(labels.tolist())

    hook = register_module_forward_pre_hook(watch)
    try:
        train_on_plain_images(small_run(tmp_path, batch_size=60, steps=10, label_dropout=0.25))
    finally:
        hook.remove()
    assert len(seen) == 600
    assert set(seen) == {0, 1, 2, 3, 4, 5, 6}
    assert 0.18 < seen.count(6) / 600 < 0.32


def test_learning_rate_rises_stays_and_falls(tmp_path: Path) -> None:
    run = small_run(tmp_path, learning_rate=1.0, warmup_steps=10, decay=0.4)
    # The first update of the published code has a learning rate of 0.
    assert learning_rate(run, 0, 0.0) == 0
    assert learning_rate(run, 1, 0.0) == pytest.approx(0.1)
    assert learning_rate(run, 9, 0.1) == pytest.approx(0.9)
    assert learning_rate(run, 10, 0.1) == pytest.approx(1.0)
    assert learning_rate(run, 99, 0.6) == pytest.approx(1.0)
    assert learning_rate(run, 99, 0.8) == pytest.approx(0.5)
    assert learning_rate(run, 99, 1.0) == pytest.approx(0.0)
    published = dataclasses.replace(run, decay=0.0)
    assert learning_rate(published, 99, 1.0) == 1.0


def test_the_ema_follows_its_definition(tmp_path: Path) -> None:
    """After one step the EMA has moved by 1 − (1 + 0)/(10 + 0) of the way."""
    # Without warm-up: its first step changes no weight.
    train_on_plain_images(small_run(tmp_path / "run", steps=1, warmup_steps=0))
    tensors, _ = load_checkpoint(tmp_path / "run" / CHECKPOINT)
    torch.manual_seed(0)
    initial = DiMR.from_preset("tiny").state_dict()
    name = "stages.0.blocks.0.block2.w0.weight"
    expected = 0.1 * initial[name] + 0.9 * tensors[f"model.{name}"]
    torch.testing.assert_close(tensors[f"ema.{name}"], expected)
    assert not torch.equal(tensors[f"model.{name}"], initial[name])


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    train_on_plain_images(small_run(tmp_path, steps=1))
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        train_on_plain_images(small_run(tmp_path, steps=1))
    assert (tmp_path / CHECKPOINT).read_bytes() == before


LOCK_AND_SLEEP = """
import sys, time
from filelock import FileLock

lock = FileLock(sys.argv[1])
lock.acquire()
print("locked", flush=True)
time.sleep(60)
"""


def test_a_run_that_another_process_resumes_is_left_to_it(tmp_path: Path) -> None:
    """The lock ends when that process is killed."""
    train_on_plain_images(small_run(tmp_path, steps=1))
    before = (tmp_path / CHECKPOINT).read_bytes()
    command = [sys.executable, "-c", LOCK_AND_SLEEP, tmp_path / ".lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(OSError, match="another process is writing there"):
            train_on_plain_images(small_run(tmp_path), resume=True, lock_timeout=0.2)
        assert (tmp_path / CHECKPOINT).read_bytes() == before
        other.kill()
    assert train_on_plain_images(small_run(tmp_path), resume=True).steps == 8


def test_an_unwritable_output_fails_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        train_on_plain_images(small_run(tmp_path / "file" / "run"))
    with pytest.raises(FileNotFoundError, match="data: got 'cats'"):
        train(small_run(tmp_path / "run", data="cats"))


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
        ({"selective_checkpointing": (3,)}, "selective_checkpointing: got branch 3"),
        (
            {"checkpointing": (0, 1), "selective_checkpointing": (1,)},
            r"selective_checkpointing: got \(1,\)",
        ),
        ({"image_size": 0}, "image_size: got 0"),
        ({"sharding": "fsdp2"}, "sharding: got 'fsdp2' on one process"),
        (
            {"sharding": "fsdp2", "precision": "fp16"},
            "sharding: got 'fsdp2', expected none, or fsdp2",
        ),
        ({"score_images": 1}, "score_images: got 1"),
        ({"nonfinite": "ignore"}, "nonfinite: got 'ignore', expected one of stop, skip"),
        ({"precision": "fp8"}, "precision: got 'fp8', expected one of auto, fp32"),
        ({"preset": "huge"}, "preset: got 'huge'"),
        ({"device": "abacus"}, "device: got 'abacus'"),
    ],
)
def test_bad_settings_are_named_before_any_work(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train_on_plain_images(small_run(tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_accumulation_and_activation_checkpointing_change_only_rounding(tmp_path: Path) -> None:
    train_on_plain_images(small_run(tmp_path / "whole"))
    changed = small_run(
        tmp_path / "parts", accumulation=4, checkpointing=(0,), selective_checkpointing=(1, 2)
    )
    train_on_plain_images(changed)
    whole, metadata = load_checkpoint(tmp_path / "whole" / CHECKPOINT)
    parts, other = load_checkpoint(tmp_path / "parts" / CHECKPOINT)
    torch.testing.assert_close(parts["losses"], whole["losses"], rtol=1e-4, atol=1e-5)
    # The checkpoint records what was trained, not how the gradients were computed.
    assert other["config"] == metadata["config"]
    assert other["recipe"] == metadata["recipe"]


def test_fp16_scales_its_loss_and_resumes_exactly(tmp_path: Path) -> None:
    settings = {"precision": "fp16", "learning_rate": 3e-3, "decay": 0.0}
    once = train_on_plain_images(small_run(tmp_path / "once", steps=25, **settings))
    assert once.precision == "fp16"
    assert once.last_loss < once.first_loss
    train_on_plain_images(small_run(tmp_path / "parts", steps=17, **settings))
    _, metadata = load_checkpoint(tmp_path / "parts" / CHECKPOINT)
    assert metadata["scaler"]["scale"] > 0
    train_on_plain_images(small_run(tmp_path / "parts", steps=25, **settings), resume=True)
    assert same_tensors(tmp_path / "parts", tmp_path / "once")
