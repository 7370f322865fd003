"""Training as it is launched: killed and resumed, on one process and on two, on a full disk."""

import dataclasses
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from dimr_fast.checkpoint import load_checkpoint, load_model
from dimr_fast.data.latents import FORMAT, MANIFEST, open_shard, write_shard
from dimr_fast.data.loader import batch_indices
from dimr_fast.data.scaling import LatentScale, scale_to_dict
from dimr_fast.training import TrainConfig, train
from dimr_fast.training.averages import average_weights
from dimr_fast.training.loop import NONFINITE
from dimr_fast.training.state import CHECKPOINT
from tests.support.autoencoder import save_autoencoder
from tests.support.runs import contents, noise_images, reached

pytest.importorskip("accelerate", reason="needs the accelerate package")
psutil = pytest.importorskip("psutil", reason="needs the psutil package")

pytestmark = pytest.mark.slow

STEPS = 16
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_images(tmp_path_factory.mktemp("images"))


def command(images: Path, output: Path, *changes: str, processes: int = 1) -> list[str]:
    """Return the command of a run that writes a checkpoint after every step.

    So a kill may come while one is written.
    """
    settings = [
        f"data={images}",
        "preset=tiny",
        "minutes=none",
        f"steps={STEPS}",
        "batch_size=8",
        "precision=fp32",
        "checkpoint_minutes=1e-9",
        "average_steps=4",
        *changes,
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [*launch, "dimr_fast.training", "--output", str(output), *words]


def run(
    words: list[str], limit: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
        env=ENVIRONMENT,
    )


def finish(words: list[str]) -> None:
    done = run(words)
    assert done.returncode == 0, done.stderr


def kill_after(
    words: list[str], checkpoint: Path, step: int, *, launcher_only: bool = False
) -> list[psutil.Process]:
    """Kill all processes of a run, or only their launcher, once its checkpoint is at `step`.

    Return the processes below the launcher.
    """
    process = subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    deadline = time.monotonic() + 120
    while reached(checkpoint) < step:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.003)
    # The launcher gives each of its processes a session of its own: no group has them all.
    below = psutil.Process(process.pid).children(recursive=True)
    for other in [] if launcher_only else below:
        other.kill()
    process.kill()
    process.wait()
    return below


def assert_same(a: Path, b: Path) -> None:
    one, other = contents(a), contents(b)
    assert one.keys() == other.keys()
    assert len(one["losses"]) == STEPS
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an undisturbed run on one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    finish(command(images, output))
    return output


@pytest.fixture(scope="module")
def together(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the same run on two processes."""
    output = tmp_path_factory.mktemp("together") / "run"
    finish(command(images, output, processes=2))
    assert json.loads((output / "train.json").read_text())["result"]["processes"] == 2
    return output


def test_a_killed_and_resumed_run_equals_an_undisturbed_one(
    images: Path, alone: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words = command(images, output)
    kill_after(words, output / CHECKPOINT, 3)
    kill_after([*words, "--set", "workers=1", "--resume"], output / CHECKPOINT, 11)
    finish([*words, "--resume"])
    assert_same(output, alone)
    # The unfinished files of the killed processes are removed.
    assert not list(output.glob(".*.part"))


def test_a_killed_and_resumed_run_of_two_processes_equals_an_undisturbed_one(
    images: Path, together: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words = command(images, output, processes=2)
    kill_after(words, output / CHECKPOINT, 3, launcher_only=True)
    kill_after([*words, "--resume"], output / CHECKPOINT, 9)
    finish([*words, "--resume"])
    assert_same(output, together)


def test_a_run_ends_with_its_launcher(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = command(images, output, "steps=1000000", "checkpoint_minutes=0.001", processes=2)
    words[words.index("--nproc-per-node=2")] = "--nproc-per-node=1"
    below = kill_after(words, output / CHECKPOINT, 1, launcher_only=True)
    assert below
    _, alive = psutil.wait_procs(below, timeout=20)
    assert not alive, "its processes still train"


@pytest.mark.parametrize("kind", ["none", "fsdp2"])
def test_two_processes_train_what_one_does(
    images: Path, alone: Path, together: Path, tmp_path: Path, kind: str
) -> None:
    run = together
    if kind == "fsdp2":
        run = tmp_path / "run"
        seldom = ("checkpoint_minutes=0.005",)  # to gather takes longer than a step
        words = command(images, run, "sharding=fsdp2", "accumulation=2", *seldom, processes=2)
        kill_after(words, run / CHECKPOINT, 5)
        finish([*words, "--resume"])
    one, two = contents(alone), contents(run)
    assert one.keys() == two.keys()
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-3, atol=1e-4)
    # A shard's whole, under the published names.
    assert all(two[name].shape == tensor.shape for name, tensor in one.items())
    assert load_model(run / CHECKPOINT).classes == ("dark", "light")
    one, two = (average_weights(folder / CHECKPOINT, 0.07) for folder in (alone, run))
    assert one.keys() == two.keys()
    assert all(torch.isclose(two[n], x, rtol=0, atol=0.02).all() for n, x in one.items())


TRAIN_WITH_A_PRECISION_PER_RANK = """
import os, pathlib, sys
from dimr_fast.training import TrainConfig, train

precision = "fp32" if os.environ["RANK"] == "0" else "bf16"
changes = [*sys.argv[2:], f"precision={precision}"]
train(TrainConfig.read("demo", changes, pathlib.Path(sys.argv[1])))
"""


def test_rank_0_decides_the_precision_of_all_processes(
    images: Path, together: Path, tmp_path: Path
) -> None:
    """Where "auto" measures the device, close calls could differ between processes."""
    script = tmp_path / "script.py"
    script.write_text(TRAIN_WITH_A_PRECISION_PER_RANK)
    words = command(images, tmp_path / "run", "device=auto", processes=2)
    place = words.index("dimr_fast.training")
    changes = words[words.index("--set") + 1 :: 2]
    finish([*words[: place - 1], str(script), str(tmp_path / "run"), *changes])
    assert json.loads((tmp_path / "run" / "train.json").read_text())["result"]["processes"] == 2
    assert_same(tmp_path / "run", together)


def test_a_step_that_is_not_finite_on_one_process_is_skipped_by_all(tmp_path: Path) -> None:
    """One latent is NaN. Each process computes its share of a batch in two micro-batches."""
    count, bad = 20, 13
    moments = torch.randn(count, 2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    moments[bad] = math.nan
    folder = tmp_path / "latents"
    folder.mkdir()
    write_shard(folder / "shard.safetensors", moments, torch.arange(count) % 2, {})
    about = open_shard(folder / "shard.safetensors").about
    entry = {"file": "shard.safetensors", "count": count, "sha256": about["sha256"]}
    manifest = {
        "format": FORMAT,
        "classes": {"dark": 10, "light": 10},
        "shape": [8, 16, 16],
        "dtype": "fp32",
        "scale": scale_to_dict(LatentScale()),
        "settings": {},
        "shards": [entry],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    run = tmp_path / "run"
    # AdamW: the losses are compared, and Muon amplifies what rounding makes of them.
    optimizer = ("optimizer=adamw", "learning_rate=4e-3")
    settings = ("nonfinite=skip", "accumulation=2", "steps=6", "milestone_steps=1", *optimizer)
    finish(command(folder, run, *settings, processes=2))

    # A single process trains on the same numbers, including the noise of the latents.
    words = command(folder, tmp_path / "alone", *settings)
    config = TrainConfig.read(None, words[words.index("--set") + 1 :: 2], tmp_path / "alone")
    train(config)
    losses = [contents(path)["losses"] for path in (run, tmp_path / "alone")]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4, equal_nan=True)
    with pytest.raises(ValueError, match="image_size: got 16, expected none: latents have their"):
        train(dataclasses.replace(config, output=tmp_path / "other", image_size=16))

    drawing = dataclasses.replace(config, output=tmp_path / "drawing", sample_steps=6)
    with pytest.raises(ValueError, match="autoencoder: got None, expected an AutoencoderKL"):
        train(drawing)
    autoencoder = save_autoencoder(tmp_path / "autoencoder", blocks=2)
    train(dataclasses.replace(drawing, autoencoder=str(autoencoder)))
    with Image.open(drawing.output / "samples" / "00000006.png") as grid:
        assert len(grid.convert("RGB").getcolors(100_000) or ()) > 100

    batches = [batch_indices(count, 8, 0, step) for step in range(6)]
    skipped = [step for step, batch in enumerate(batches) if bad in batch]
    assert 0 < len(skipped) < 6
    assert contents(run)["losses"].isnan().nonzero().flatten().tolist() == skipped
    assert all(p.isfinite().all() for p in load_model(run / CHECKPOINT).model.parameters())
    assert "NaN" not in (run / "train.json").read_text()
    # The file holds the batch of all processes, and the state before it.
    kept, metadata = load_checkpoint(run / NONFINITE)
    assert metadata["step"] == skipped[-1]
    assert kept["input.indices"].tolist() == batches[skipped[-1]].tolist()
    nan_rows = kept["input.x0"].flatten(1).isnan().all(1)
    assert kept["input.indices"][nan_rows].tolist() == [bad]
    before, _ = load_checkpoint(run / f"checkpoint-{skipped[-1]:08d}.safetensors")
    assert all(torch.equal(kept[name], before[name]) for name in before if name != "losses")


def test_a_full_disk_keeps_the_previous_checkpoint(
    images: Path, alone: Path, tmp_path: Path
) -> None:
    """The first checkpoint, without the optimizer's state, fits; those after it do not."""
    size = (alone / CHECKPOINT).stat().st_size

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * 3 // 4, resource.RLIM_INFINITY))

    output = tmp_path / "run"
    words = command(images, output, "steps=3")
    done = run(words, limit)
    assert done.returncode == 2
    assert "no checkpoint at step 1:" in done.stderr + done.stdout
    assert "the previous one stays" in done.stderr + done.stdout
    assert "dimr-fast: error: " in done.stderr.splitlines()[-1]
    assert load_checkpoint(output / CHECKPOINT)[1]["step"] == 0
    # With room again, the run resumes from there.
    finish([*command(images, output), "--resume"])
    assert_same(output, alone)


def test_a_signal_to_the_whole_process_group_leaves_time_to_save(
    images: Path, tmp_path: Path
) -> None:
    """Launchers, schedulers and terminals send it to the data loader workers too."""
    output = tmp_path / "run"
    process = subprocess.Popen(
        command(images, output, "steps=100000", "workers=2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while reached(output / CHECKPOINT) < 3:
        assert process.poll() is None
        time.sleep(0.003)
    os.killpg(process.pid, signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors[-2000:]
    assert "stopped at step" in out


def test_accelerate_launch_starts_a_run(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    _, _, *words = command(images, output, "steps=2")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    finish([*launch, "-m", *words])
    assert load_checkpoint(output / CHECKPOINT)[1]["step"] == 2


def test_ctrl_c_on_one_of_two_processes_stops_both_with_a_checkpoint(
    images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    process = subprocess.Popen(
        command(images, output, "steps=100000", processes=2),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=ENVIRONMENT,
    )
    while reached(output / CHECKPOINT) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    psutil.Process(process.pid).children()[-1].send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1  # torchrun's: rank 0 ends with the status of a signal
    assert out.count("stopped at step") == 1
    assert f"go on with: dimr-fast train --output {output} --resume" in out
    assert (output / "train.json").exists()
