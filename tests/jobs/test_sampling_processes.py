"""Sampling jobs that are killed and resumed, or shared by several processes."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dimr_fast.checkpoint import TrainedModel
from dimr_fast.data.autoencoder import Autoencoder
from dimr_fast.data.scaling import LatentScale
from dimr_fast.sampling import SampleConfig, SamplerConfig, sample
from dimr_fast.utils.files import lock_folder
from dimr_fast.utils.sharded import Heartbeats, heartbeat
from tests.support.autoencoder import save_autoencoder
from tests.support.files import file_size_limit
from tests.support.models import trained_model, write_checkpoint
from tests.support.sampling import command_words, contents, small_job


@pytest.fixture
def trained() -> TrainedModel:
    return trained_model()


def test_a_killed_and_resumed_job_equals_an_undisturbed_one(
    trained: TrainedModel, tmp_path: Path
) -> None:
    # So many steps that a batch takes far longer than noticing that it is written.
    sampler = SamplerConfig(steps=60, batch_size=2, precision="fp32")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    sample(small_job(trained, whole, sampler=sampler))
    job = small_job(trained, parts, sampler=sampler)
    shards = job.output / "parts"
    command = [sys.executable, "-m", "dimr_fast", *command_words(job)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not (shards / "00000002.npy").exists():
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    # A kill while a file is written leaves an unfinished one.
    (job.output / "images" / ".000011.png.1.part").write_bytes(b"half a picture")
    (shards / ".00000010.npy.1.part").write_bytes(b"half a shard")
    kept = {path: path.stat().st_mtime_ns for path in shards.glob("*.npy")}
    assert 2 <= len(kept) < 6
    assert not json.loads((job.output / "sample.json").read_text())["finished"]

    for change, message in (
        ({"per_class": 3}, "a job with count 12 is unfinished"),
        ({"formats": ("npz",)}, "a job with formats .* is unfinished"),
        ({"classes": ("a", "b", "c")}, "a job with count 12 is unfinished"),
        ({"sampler": dataclasses.replace(sampler, seed=1)}, "a job with seed 0 is unfinished"),
        ({"sampler": dataclasses.replace(sampler, batch_size=3)}, "a job with batch_size 2"),
        ({"sampler": dataclasses.replace(sampler, solver="ddim")}, "a job with solver 'DPM"),
    ):
        with pytest.raises(ValueError, match=f"output: got .*, where {message}"):
            sample(dataclasses.replace(job, **change))
    with torch.no_grad():
        next(trained.model.parameters()).add_(1)
    write_checkpoint(trained, parts / "other.safetensors")
    with pytest.raises(ValueError, match="a job of other weights is unfinished"):
        sample(dataclasses.replace(job, checkpoint=parts / "other.safetensors"))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    # With precision "auto" the job keeps its own; the checkpoint may be at another path.
    moved = (parts / "checkpoint.safetensors").rename(parts / "moved.safetensors")
    automatic = dataclasses.replace(sampler, precision="auto")
    sample(dataclasses.replace(job, checkpoint=moved, sampler=automatic))
    assert contents(job.output) == contents(whole / "out")


def header_of_other_images(part: bytes) -> bytes:
    """Return a whole file of half as many images."""
    file = io.BytesIO()
    np.save(file, np.load(io.BytesIO(part))[:1])
    return file.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda part: b"",
        lambda part: part[:-1],
        lambda part: part[:50],
        lambda part: bytes(len(part)),
        header_of_other_images,
    ],
)
def test_a_damaged_batch_is_drawn_anew(
    trained: TrainedModel, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    job = small_job(trained, tmp_path, formats=("png", "npz"))
    with file_size_limit(8192), pytest.raises(OSError, match=r"samples\.npz"):
        sample(job)  # all batches are written, but not what they are joined to
    parts = sorted((job.output / "parts").glob("*.npy"))
    assert len(parts) == 6
    written = parts[3].read_bytes()
    parts[3].write_bytes(damage(written))
    kept = {path: path.stat().st_mtime_ns for path in parts if path != parts[3]}
    with file_size_limit(8192), pytest.raises(OSError, match=r"samples\.npz"):
        sample(job)
    assert parts[3].read_bytes() == written
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    sample(job)


@pytest.fixture
def unfinished_latent_job(trained: TrainedModel, tmp_path: Path) -> SampleConfig:
    """Return a job with an autoencoder whose batches are written, but not the npz file."""
    latents = dataclasses.replace(trained, scale=LatentScale(0.5))
    settings = {"blocks": 2, "latent_channels": 3, "scaling_factor": 0.5}
    folder = save_autoencoder(tmp_path / "autoencoder", **settings)
    job = small_job(latents, tmp_path, formats=("npz",), autoencoder=str(folder))
    with file_size_limit(20_000), pytest.raises(OSError, match=r"samples\.npz"):
        sample(job)
    return job


def test_a_job_goes_on_with_its_autoencoder_only(
    unfinished_latent_job: SampleConfig, tmp_path: Path
) -> None:
    """Its weights count: the same weights may be in another folder, others in the same one."""
    job = unfinished_latent_job
    report = json.loads((job.output / "sample.json").read_text())
    autoencoder = Autoencoder.load(str(job.autoencoder), torch.device("cpu"))
    assert report["autoencoder"] == autoencoder.fingerprint()
    moved = (tmp_path / "autoencoder").rename(tmp_path / "moved")
    weights = tmp_path / "autoencoder" / "diffusion_pytorch_model.safetensors"
    shutil.copytree(moved, weights.parent)
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights)
    with pytest.raises(ValueError, match=r"output: got .* a job of another autoencoder is unfin"):
        sample(job)
    sample(dataclasses.replace(job, autoencoder=str(moved)))
    assert (job.output / "samples.npz").exists()


def test_a_job_of_a_version_that_recorded_the_name_of_the_autoencoder_is_refused(
    unfinished_latent_job: SampleConfig,
) -> None:
    job = unfinished_latent_job
    path = job.output / "sample.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"autoencoder": "someone/vae"}))
    kept = contents(job.output)
    message = r"an earlier version .* only the name of its autoencoder, 'someone/vae'.* another fol"
    with pytest.raises(ValueError, match=message):
        sample(job)
    assert contents(job.output) == kept


@pytest.mark.parametrize("sampler", [{}, {"steps": 2}, None, "dpm++"])
def test_a_report_of_another_version_is_an_error(
    trained: TrainedModel, tmp_path: Path, sampler: object
) -> None:
    job = small_job(trained, tmp_path, sampler=SamplerConfig(steps=2, batch_size=2))
    job.output.mkdir()
    (job.output / "sample.json").write_text(json.dumps({"finished": False, "sampler": sampler}))
    with pytest.raises((ValueError, FileExistsError), match=r"another (folder|output)"):
        sample(job)


def test_several_processes_draw_the_same_images_as_one(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both the processes that a job starts and those of a launcher: a shard is one process's."""
    alone, started, launched = (tmp_path / name for name in ("alone", "started", "launched"))
    for folder in (alone, started, launched):
        folder.mkdir()
    job = small_job(trained, launched)
    second = subprocess.Popen(
        [sys.executable, "-m", "dimr_fast", *command_words(job)],
        env=os.environ | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    sample(small_job(trained, alone))
    sample(small_job(trained, started, processes=2))
    assert contents(started / "out") == contents(alone / "out")

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(sample(job)) == 4
    assert second.communicate(timeout=120) == ("", None)
    assert second.returncode == 0
    assert contents(launched / "out") == contents(alone / "out")


def test_a_failing_process_is_reported(trained: TrainedModel, tmp_path: Path) -> None:
    job = small_job(trained, tmp_path, processes=2, formats=("png",))
    job.output.mkdir()
    # A link to nothing: the check before the work finds no folder, and no process can make one.
    (job.output / "images").symlink_to(tmp_path / "nothing")
    with pytest.raises(ChildProcessError, match=r"process \d stopped: .*images"):
        sample(job)


def test_a_checkpoint_that_changes_before_the_processes_load_it_is_detected(
    trained: TrainedModel, tmp_path: Path
) -> None:
    job = small_job(trained, tmp_path, processes=2)
    other = trained_model()
    with torch.no_grad():
        next(other.model.parameters()).add_(1)

    def replace_checkpoint() -> None:
        while not (job.output / "sample.json").exists():
            time.sleep(0.001)
        write_checkpoint(other, tmp_path / "checkpoint.safetensors")

    thread = threading.Thread(target=replace_checkpoint)
    thread.start()
    with pytest.raises(ChildProcessError, match="has changed since the job began"):
        sample(job)
    thread.join()


def test_the_number_of_processes_is_the_launchers(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"processes: got 2, expected None or 1"):
        sample(small_job(trained, tmp_path, processes=2))


def test_a_process_waits_for_rank_0_only_so_long(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(TimeoutError, match="rank 0 has not begun"):
        sample(small_job(trained, tmp_path), start_timeout=0.2)


def test_rank_0_waits_for_a_silent_process_only_so_long(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its machine has died. The same command then draws what is missing."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    job = small_job(trained, tmp_path)
    with pytest.raises(TimeoutError, match=r"process 1 has sent no heartbeat .* the 3 batches"):
        sample(job, start_timeout=0.2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert len(sample(job)) == 4


def test_a_slow_process_sends_heartbeats(tmp_path: Path) -> None:
    heartbeats, path = Heartbeats(), tmp_path / "process-1"
    assert heartbeats.age(path) < 0.1
    with heartbeat(path, interval=0.05):
        heard = []
        for _ in range(20):
            time.sleep(0.05)
            heard.append(heartbeats.age(path))
    assert max(heard) < 0.5
    time.sleep(0.6)
    assert heartbeats.age(path) > 0.5


def test_a_job_is_drawn_by_one_command_at_a_time(trained: TrainedModel, tmp_path: Path) -> None:
    job = small_job(trained, tmp_path)
    sample(job)
    # The folder as it is while another command writes the last files.
    report, shards = job.output / "sample.json", job.output / "parts"
    finished = report.read_text()
    report.write_text(finished.replace('"finished": true', '"finished": false'))
    shards.mkdir()
    locked = threading.Event()

    def finish() -> None:
        with lock_folder(shards):
            locked.set()
            time.sleep(1)
            report.write_text(finished)

    with lock_folder(shards), pytest.raises(OSError, match="another process is writing there"):
        sample(job, lock_timeout=0.1)
    other = threading.Thread(target=finish)
    other.start()
    locked.wait()
    # It waits, finds the job finished, and removes the shards that a kill may have left.
    with pytest.raises(FileExistsError, match="exists already"):
        sample(job)
    other.join()
    assert not shards.exists()
