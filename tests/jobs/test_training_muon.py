"""Training with Muon: resumed, accumulated, skipping, in half precision, on several processes."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dimr_fast.checkpoint import CheckpointError, load_checkpoint, load_model
from dimr_fast.training import CHECKPOINT, TrainConfig, train
from tests.support.paths import FILES, ROOT
from tests.support.training import nan_predictions, same_tensors, small_run, train_on_plain_images


def run_of_muon(output: Path, **changes: Any) -> TrainConfig:
    return small_run(output, optimizer="muon", **changes)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, precision: str
) -> None:
    def interrupt(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    whole = train_on_plain_images(run_of_muon(tmp_path / "whole", precision=precision))
    assert whole.last_loss < whole.first_loss * 1.1
    stopped = train_on_plain_images(run_of_muon(tmp_path / "parts", precision=precision), interrupt)
    assert stopped.steps == 3
    train_on_plain_images(run_of_muon(tmp_path / "parts", precision=precision), resume=True)
    assert same_tensors(tmp_path / "whole", tmp_path / "parts")
    # One average for a matrix, in place of two and a step count.
    kept, _ = load_checkpoint(tmp_path / "whole" / CHECKPOINT)
    matrix = "stages.0.blocks.0.block2.w0.weight"
    assert [name for name in kept if name.startswith("optimizer.") and matrix in name] == [
        f"optimizer.momentum_buffer.{matrix}"
    ]


def test_a_run_that_took_no_step_resumes(tmp_path: Path) -> None:
    def interrupt(step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_on_plain_images(run_of_muon(tmp_path), interrupt)
    assert train_on_plain_images(run_of_muon(tmp_path), resume=True).steps == 8


def test_accumulated_gradients_train_alike(tmp_path: Path) -> None:
    train_on_plain_images(run_of_muon(tmp_path / "whole"))
    train_on_plain_images(run_of_muon(tmp_path / "parts", accumulation=4))
    runs = (load_checkpoint(tmp_path / name / CHECKPOINT)[0] for name in ("parts", "whole"))
    torch.testing.assert_close(*(run["losses"] for run in runs), rtol=1e-3, atol=1e-4)


def test_a_step_that_is_not_finite_is_skipped(tmp_path: Path) -> None:
    with nan_predictions({1, 5}):
        train_on_plain_images(run_of_muon(tmp_path, nonfinite="skip"))
    tensors, _ = load_checkpoint(tmp_path / CHECKPOINT)
    assert tensors["losses"].isnan().nonzero().flatten().tolist() == [0, 4]
    assert all(t.isfinite().all() for name, t in tensors.items() if name != "losses")


@pytest.mark.parametrize("before", ["adamw", "muon"])
def test_a_run_keeps_its_optimizer(tmp_path: Path, before: str) -> None:
    train_on_plain_images(small_run(tmp_path, steps=1, optimizer=before))
    after = "muon" if before == "adamw" else "adamw"
    with pytest.raises(CheckpointError, match=f"trained with optimizer {before}, not {after}"):
        train_on_plain_images(small_run(tmp_path, optimizer=after), resume=True)


def test_a_run_that_does_not_name_its_optimizer_used_adamw(tmp_path: Path) -> None:
    """Checkpoints of earlier versions do not name it."""
    files = Path(shutil.copytree(FILES / "before_packages", tmp_path / "files"))
    changes = ["steps=5", f"data={files / 'images'}", "device=cpu", "optimizer=muon"]
    config = TrainConfig.read(files / "run" / "config.yaml", changes, files / "run")
    with pytest.raises(CheckpointError, match="trained with optimizer adamw, not muon"):
        train(config, resume=True)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optimizer: got 'sgd', expected one of adamw, muon"):
        train_on_plain_images(small_run(tmp_path, optimizer="sgd"))


TRAIN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.support.training import small_run, train_on_plain_images

whole, parts, sharding = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
settings = {"optimizer": "muon", "sharding": sharding, "decay": 0.0, "accumulation": 2}
train_on_plain_images(small_run(whole, **settings))
train_on_plain_images(small_run(parts, steps=3, **settings))
train_on_plain_images(small_run(parts, **settings), resume=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_processes_train_what_one_does_and_resume_exactly(
    tmp_path: Path, sharding: str
) -> None:
    pytest.importorskip("accelerate", reason="needs the accelerate package")
    script = tmp_path / "script.py"
    script.write_text(TRAIN)
    alone, whole, parts = (tmp_path / name for name in ("alone", "whole", "parts"))
    train_on_plain_images(run_of_muon(alone, decay=0.0))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(script), str(ROOT), str(whole), str(parts), sharding],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert same_tensors(whole, parts)
    one, two = (load_checkpoint(path / CHECKPOINT)[0] for path in (alone, whole))
    assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in two.items()}
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-3, atol=1e-4)
    assert load_model(whole / CHECKPOINT).classes == tuple("abcdef")
