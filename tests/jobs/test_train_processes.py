"""Training as it is launched: killed and resumed, on one process and on two, on a full disk."""

import dataclasses
import json
import math
import os
import resource
import signal
import struct
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
from dimr_fast.training.loop import NONFINITE
from dimr_fast.training.state import CHECKPOINT
from tests.support.models import Doubling

pytest.importorskip("accelerate", reason="needs the accelerate package")

pytestmark = pytest.mark.slow

STEPS = 30
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of ten pictures of noise."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for name in ("dark", "light"):
        (folder / name).mkdir()
        for number in range(10):
            pixels = torch.randint(0, 128, (16, 16, 3), generator=generator, dtype=torch.uint8)
            pixels += 127 * (name == "light")
            Image.fromarray(pixels.numpy()).save(folder / name / f"{number}.png")
    return folder


def command(images: Path, output: Path, *changes: str, processes: int = 1) -> list[str]:
    """What a user types; every step is saved, so that a kill may hit the writing."""
    settings = [
        f"data={images}",
        "preset=tiny",
        "minutes=none",
        f"steps={STEPS}",
        "batch_size=8",
        "precision=fp32",
        "checkpoint_minutes=1e-9",
        *changes,
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [*launch, "dimr_fast.training.run", "--output", str(output), *words]


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
) -> None:
    """SIGKILL to all processes of a run, or their launcher, once its checkpoint is at `step`."""
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
    if not launcher_only:
        # The launcher gives each of its processes a session of its own: no group has them all.
        subprocess.run(["pkill", "-KILL", "-f", str(checkpoint.parent)], check=True)
    process.kill()
    process.wait()


def reached(checkpoint: Path) -> int:
    """The step of a checkpoint, from its header alone: the file may be replaced at any moment."""
    try:
        with checkpoint.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            return int(json.loads(file.read(size))["__metadata__"]["step"])
    except FileNotFoundError:
        return -1


def contents(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / CHECKPOINT)[0]


def assert_same(a: Path, b: Path) -> None:
    one, other = contents(a), contents(b)
    assert one.keys() == other.keys()
    assert len(one["losses"]) == STEPS
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that nobody disturbed."""
    output = tmp_path_factory.mktemp("alone") / "run"
    finish(command(images, output))
    return output


@pytest.fixture(scope="module")
def together(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two processes."""
    output = tmp_path_factory.mktemp("together") / "run"
    finish(command(images, output, processes=2))
    assert json.loads((output / "train.json").read_text())["result"]["processes"] == 2
    return output


def test_a_killed_run_goes_on_bit_for_bit(images: Path, alone: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = command(images, output)
    kill_after(words, output / CHECKPOINT, 3)
    kill_after([*words, "--set", "workers=1", "--resume"], output / CHECKPOINT, 11)
    finish([*words, "--resume"])
    assert_same(output, alone)
    # What the killed processes had begun to write is gone.
    assert not list(output.glob(".*.part"))


def test_a_killed_run_of_two_processes_goes_on_bit_for_bit(
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
    kill_after(words, output / CHECKPOINT, 1, launcher_only=True)
    deadline = time.monotonic() + 20
    while subprocess.run(["pgrep", "-f", str(output)], stdout=subprocess.DEVNULL).returncode == 0:
        assert time.monotonic() < deadline, "its processes still train"
        time.sleep(0.1)


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


BETWEEN_TWO_MINDS = """
import os, sys
from dimr_fast import cli
from dimr_fast.utils import device

device._bf16_is_faster = lambda: os.environ["RANK"] == "1"
sys.exit(cli.main(sys.argv[1:]))
"""


def test_processes_left_to_choose_by_themselves_choose_alike(
    images: Path, together: Path, tmp_path: Path
) -> None:
    """Without a GPU they share the CPU; which precision is faster there, the first one says."""
    script = tmp_path / "script.py"
    script.write_text(BETWEEN_TWO_MINDS)
    words = command(images, tmp_path / "run", "precision=auto", "device=auto", processes=2)
    place = words.index("dimr_fast.training.run")
    finish([*words[: place - 1], str(script), "train", *words[place + 1 :]])
    assert json.loads((tmp_path / "run" / "train.json").read_text())["result"]["processes"] == 2
    assert_same(tmp_path / "run", together)


def test_what_is_not_finite_in_one_process_is_left_out_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of latents one is spoilt. Each process computes its share of a batch in two parts."""
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
        "shards": [entry],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    run = tmp_path / "run"
    settings = ("nonfinite=skip", "accumulation=2", "steps=6", "milestone_steps=1")
    finish(command(folder, run, *settings, processes=2))

    # One process alone sees the same numbers, the noise in its latents too.
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
    monkeypatch.setattr("dimr_fast.data.autoencoder.Autoencoder", Doubling)
    monkeypatch.setattr(Doubling, "channels", 4)
    train(dataclasses.replace(drawing, autoencoder="the autoencoder"))
    with Image.open(drawing.output / "samples" / "00000006.png") as grid:
        assert len(grid.convert("RGB").getcolors(100_000) or ()) > 100

    batches = [batch_indices(count, 8, 0, step) for step in range(6)]
    spoilt = [step for step, batch in enumerate(batches) if bad in batch]
    assert 0 < len(spoilt) < 6
    assert contents(run)["losses"].isnan().nonzero().flatten().tolist() == spoilt
    assert all(p.isfinite().all() for p in load_model(run / CHECKPOINT).model.parameters())
    assert "NaN" not in (run / "train.json").read_text()
    # What was kept is the batch of all processes, and the state before it.
    kept, metadata = load_checkpoint(run / NONFINITE)
    assert metadata["step"] == spoilt[-1]
    assert kept["input.indices"].tolist() == batches[spoilt[-1]].tolist()
    of_nan = kept["input.x0"].flatten(1).isnan().all(1)
    assert kept["input.indices"][of_nan].tolist() == [bad]
    before, _ = load_checkpoint(run / f"checkpoint-{spoilt[-1]:08d}.safetensors")
    assert all(torch.equal(kept[name], before[name]) for name in before if name != "losses")


def test_a_disk_that_is_full_keeps_the_checkpoint_before(
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
    # With room again, the run goes on from there.
    finish([*command(images, output), "--resume"])
    assert_same(output, alone)


def test_a_signal_to_all_of_a_job_leaves_it_time_to_save(images: Path, tmp_path: Path) -> None:
    """Its reading processes get it too, from a launcher, a scheduler or a terminal."""
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
    assert process.returncode == 0, errors[-2000:]
    assert "stopped at step" in out


def test_accelerate_launches_it(images: Path, tmp_path: Path) -> None:
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
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.count("stopped at step") == 1
    assert f"go on with: dimr-fast train --output {output} --resume" in out
    assert (output / "train.json").exists()
