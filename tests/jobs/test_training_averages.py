"""Averages of any length: their mathematics, kept by a run, resumed, exported, and refused."""

import dataclasses
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dimr_fast import cli
from dimr_fast.checkpoint import CheckpointError, load_checkpoint, load_model
from dimr_fast.export import ExportConfig, export
from dimr_fast.training import CHECKPOINT
from dimr_fast.training.averages import (
    AVERAGES,
    LENGTHS,
    Average,
    average_weights,
    coefficients,
    decay_of,
    exponent,
    prefix_of,
)
from tests.support.training import same_tensors, small_run, train_on_plain_images


def test_exponents_are_those_of_the_paper() -> None:
    assert [round(exponent(length), 2) for length in LENGTHS] == [16.97, 6.94]


@pytest.mark.parametrize("length", [0.03, 0.1, 0.25])
def test_the_length_is_the_relative_deviation_of_the_averaged_steps(length: float) -> None:
    steps = 2000
    weights = torch.zeros(steps, dtype=torch.float64)
    for step in range(1, steps + 1):
        decay = decay_of(length, step)
        weights *= decay
        weights[step - 1] += 1 - decay
    position = torch.arange(1, steps + 1) / steps
    mean = (weights * position).sum()
    deviation = (weights * (position - mean).square()).sum().sqrt().item()
    assert weights.sum().item() == pytest.approx(1)
    assert deviation == pytest.approx(length, rel=0.01)


def trajectory(steps: int) -> torch.Tensor:
    """Return values that move like weights: a drift that slows down, and noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(steps, 32, generator=generator, dtype=torch.float64)
    time = torch.arange(1, steps + 1, dtype=torch.float64)[:, None]
    return time.log() * torch.randn(32, generator=generator, dtype=torch.float64) + noise


def averaged(values: torch.Tensor, length: float) -> list[torch.Tensor]:
    """Return the average after each step."""
    found = [values[0]]
    for step, value in enumerate(values[1:], 2):
        found.append(torch.lerp(value, found[-1], decay_of(length, step)))
    return found


@pytest.mark.parametrize("length", [0.03, 0.07, 0.15, 0.2])
def test_an_average_of_another_length_is_found_from_those_kept(length: float) -> None:
    values = trajectory(1000)
    wanted = averaged(values, length)[-1]
    kept = [Average(of, step) for of in LENGTHS for step in range(50, 1001, 50)]
    parts = {of: averaged(values, of) for of in LENGTHS}
    factors = coefficients(kept, Average(length, 1000))
    found = sum(
        factor * parts[one.length][one.step - 1] for factor, one in zip(factors, kept, strict=True)
    )
    assert sum(factors) == pytest.approx(1)
    nearest = min((averaged(values, of)[-1] - wanted).norm() for of in LENGTHS)
    assert (found - wanted).norm() < 0.1 * nearest


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that kept averages."""
    folder = tmp_path_factory.mktemp("run")
    train_on_plain_images(small_run(folder, average_steps=3))
    return folder


def exported(run: Path, folder: Path, length: float | None) -> dict[str, torch.Tensor]:
    export(
        ExportConfig(checkpoint=run / CHECKPOINT, output=folder, average_length=length),
    )
    return load_model(folder).model.state_dict()


def test_a_run_stores_its_averages_and_exports_one_of_any_length(run: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in (run / AVERAGES).iterdir()) == [
        "00000003.safetensors",
        "00000006.safetensors",
    ]
    kept, _ = load_checkpoint(run / CHECKPOINT)
    for length in LENGTHS:
        weights = exported(run, tmp_path / str(length), length)
        for name, value in weights.items():
            expected = kept[prefix_of(length) + name]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)
    # A short average is nearer to the last weights than a long one.
    between = exported(run, tmp_path / "between", 0.07)
    ema = exported(run, tmp_path / "ema", None)
    assert all(torch.equal(value, kept[f"ema.{name}"]) for name, value in ema.items()), (
        "without the option, the EMA weights are exported"
    )

    def distance(weights: dict[str, torch.Tensor]) -> float:
        squares = [(value - kept[f"model.{n}"]).square().sum() for n, value in weights.items()]
        return math.sqrt(sum(square.item() for square in squares))

    short, long = (exported(run, tmp_path / f"again {x}", x) for x in LENGTHS)
    assert distance(short) < distance(between) < distance(long)
    assert '"average_length": 0.07' in (tmp_path / "between" / "config.json").read_text()


def test_an_earlier_average_is_exported(run: Path, tmp_path: Path) -> None:
    settings = ExportConfig(
        checkpoint=run / CHECKPOINT,
        output=tmp_path / "earlier",
        average_length=LENGTHS[0],
        average_step=3,
    )
    export(settings)
    weights = load_model(tmp_path / "earlier").model.state_dict()
    stored, _ = load_checkpoint(run / AVERAGES / "00000003.safetensors")
    for name, value in weights.items():
        expected = stored[prefix_of(LENGTHS[0]) + name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)
    assert '"average_step": 3' in (tmp_path / "earlier" / "config.json").read_text()
    for changes, named in (
        ({"average_step": 4}, r"step: got 4, expected one with averages: \[3, 6"),
        ({"average_length": None}, "average_step: got 3, expected none without average_length"),
    ):
        output = tmp_path / "no output"
        with pytest.raises(ValueError, match=named):
            export(dataclasses.replace(settings, output=output, **changes))
        assert not output.exists()


def test_an_interrupted_and_resumed_run_stores_the_same_averages(run: Path, tmp_path: Path) -> None:
    def interrupt(step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    train_on_plain_images(small_run(tmp_path, average_steps=3), interrupt)
    train_on_plain_images(small_run(tmp_path, average_steps=3), resume=True)
    assert same_tensors(run, tmp_path)
    for path in (run / AVERAGES).iterdir():
        ours, theirs = (
            load_checkpoint(folder / AVERAGES / path.name) for folder in (run, tmp_path)
        )
        assert len(ours[0]) == len(theirs[0]) > 0
        assert all(torch.equal(value, theirs[0][name]) for name, value in ours[0].items())
        assert ours[1] == theirs[1]


def test_a_kill_after_a_checkpoint_loses_no_averages(run: Path, tmp_path: Path) -> None:
    """Averages are written after the checkpoint of the same step."""

    def interrupt(step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    train_on_plain_images(small_run(tmp_path, average_steps=3), interrupt)
    # As a kill would have left it.
    path = tmp_path / AVERAGES / "00000006.safetensors"
    path.rename(path.with_name(f".{path.name}.1.part"))
    train_on_plain_images(small_run(tmp_path, average_steps=3), resume=True)
    assert {p.name for p in path.parent.iterdir()} == {p.name for p in (run / AVERAGES).iterdir()}
    ours, theirs = (load_checkpoint(folder / AVERAGES / path.name) for folder in (run, tmp_path))
    assert all(torch.equal(value, theirs[0][name]) for name, value in ours[0].items())


def test_a_run_without_averages_says_how_to_keep_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_on_plain_images(small_run(tmp_path / "run", steps=1))
    words = ["export", "--checkpoint", str(tmp_path / "run" / CHECKPOINT)]
    words += ["--output", str(tmp_path / "out"), "--average-length", "0.1"]
    assert cli.main(words) != 0
    assert "its run kept no averages: train with average_steps" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_averages_of_another_run_are_refused(run: Path, tmp_path: Path) -> None:
    train_on_plain_images(small_run(tmp_path / "run", average_steps=3, seed=1))
    shutil.copy(run / AVERAGES / "00000003.safetensors", tmp_path / "run" / AVERAGES)
    with pytest.raises(CheckpointError, match=r"00000003.safetensors: is of another run than"):
        exported(tmp_path / "run", tmp_path / "out", 0.1)
    # A new run does not mix its averages with those that are there.
    (tmp_path / "run" / CHECKPOINT).unlink()
    with pytest.raises(FileExistsError):
        train_on_plain_images(small_run(tmp_path / "run", average_steps=3))


@pytest.mark.parametrize("length", [0.0, 0.28, -1.0, math.nan])
def test_a_length_out_of_range_is_refused(run: Path, tmp_path: Path, length: float) -> None:
    settings: dict[str, Any] = {"checkpoint": run / CHECKPOINT, "output": tmp_path / "out"}
    with pytest.raises(ValueError, match=f"average_length: got {length}, expected 0 < length"):
        export(ExportConfig(average_length=length, **settings))
    with pytest.raises(ValueError, match=f"length: got {length}, expected 0 < length"):
        exponent(length)


def test_an_average_of_an_earlier_step_is_that_of_the_run_until_then(
    run: Path, tmp_path: Path
) -> None:
    early, _ = load_checkpoint(run / AVERAGES / "00000003.safetensors")
    found = average_weights(run / CHECKPOINT, 0.05, 3)
    for name, value in found.items():
        torch.testing.assert_close(value, early[prefix_of(0.05) + name], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"step: got 4, expected one with averages: \[3, 6"):
        average_weights(run / CHECKPOINT, 0.05, 4)
