"""Files that an earlier version wrote are read: a checkpoint, latents, an unfinished sampling job.

`files/before_packages` was written when all jobs were modules of the package's root: a run of three
steps on six images, their latents, and a sampling job that was killed after two of three batches.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dimr_fast.checkpoint import CheckpointError, load_checkpoint, load_model
from dimr_fast.data.latents import LatentShards
from dimr_fast.sampling import SampleConfig, SamplerConfig, sample
from dimr_fast.training import CHECKPOINT, TrainConfig, train
from tests.support.paths import FILES

DATA = FILES / "before_packages"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A copy, because resuming writes."""
    return Path(shutil.copytree(DATA, tmp_path / "files"))


def test_a_run_is_resumed_from_its_settings_and_checkpoint(files: Path) -> None:
    changes = ["steps=5", f"data={files / 'images'}", "device=cpu"]
    config = TrainConfig.read(files / "run" / "config.yaml", changes, files / "run")
    before, metadata = load_checkpoint(files / "run" / CHECKPOINT)
    assert metadata["step"] == 3
    assert train(config, resume=True).steps == 5
    after, _ = load_checkpoint(files / "run" / CHECKPOINT)
    assert torch.equal(after["losses"][:3], before["losses"])


@pytest.mark.parametrize("change", ["min_snr=5", "half_log_snr=[0,1]", "average_steps=2"])
def test_a_setting_that_did_not_exist_cannot_be_changed(files: Path, change: str) -> None:
    changes = ["steps=5", f"data={files / 'images'}", "device=cpu", change]
    config = TrainConfig.read(files / "run" / "config.yaml", changes, files / "run")
    name = change.partition("=")[0]
    with pytest.raises(CheckpointError, match=f"was trained with {name} None, not"):
        train(config, resume=True)


def test_latents_are_read_and_their_checksums_hold(files: Path) -> None:
    latents = LatentShards(files / "latents")
    latents.verify()
    assert (len(latents), latents.classes, latents.shape) == (6, ("cats", "dogs"), (4, 2, 2))
    moments = latents.read(torch.arange(6), torch.zeros(6, dtype=torch.bool))
    assert moments.isfinite().all()


def test_a_sampling_job_is_resumed(files: Path) -> None:
    assert load_model(files / "run" / CHECKPOINT).classes == ("cats", "dogs")
    kept = {path: path.stat().st_mtime_ns for path in (files / "samples" / "parts").glob("*.npy")}
    assert len(kept) == 2
    config = SampleConfig(
        checkpoint=files / "run" / CHECKPOINT,
        output=files / "samples",
        count=6,
        formats=("npz", "grid"),
        device="cpu",
        sampler=SamplerConfig(steps=2, batch_size=2, precision="fp32"),
    )
    # Its defaults were others, so they must be given.
    with pytest.raises(
        ValueError, match=r"with solver 'DPM-Solver\+\+ single-step, order 3' is un"
    ):
        sample(config)
    given = replace(config.sampler, solver="dpm++", spacing="time", guidance=1.0)
    sample(replace(config, sampler=given))
    with (
        np.load(files / "samples" / "samples.npz") as found,
        np.load(DATA / "expected_samples.npz") as expected,
    ):
        assert np.array_equal(found["arr_1"], expected["arr_1"])
        # Kept batches are equal; another processor may sum in another order.
        assert np.array_equal(found["arr_0"][:4], expected["arr_0"][:4])
        difference = found["arr_0"][4:].astype(int) - expected["arr_0"][4:]
        assert np.abs(difference).max() <= 1
