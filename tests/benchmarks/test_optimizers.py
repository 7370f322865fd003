"""Tests of the comparison of optimizers: paired runs that resume, and their table."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.ablation.optimizers import Settings, compare
from benchmarks.ablation.report import optimizer_table
from dimr_fast.data.tiles import Tiles


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Restore the number of threads, which the comparison sets to one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tiles() -> Tiles:
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return images, torch.arange(count) % 6, torch.zeros(count, 2, dtype=torch.int64)

    return Tiles(*part(12), *part(6))


def test_runs_are_scored_once_and_shown_in_a_table(tmp_path: Path) -> None:
    settings = Settings(
        state=tmp_path / "state",
        output=tmp_path,
        steps=2,
        batch_size=2,
        muon_learning_rates=(1e-3,),
        timed_steps=1,
    )
    path = compare(settings, tiles())
    report = json.loads(path.read_text())
    assert [(run["optimizer"], run["learning_rate"]) for run in report["runs"]] == [
        ("adamw", 4e-3),
        ("muon", 1e-3),
    ]
    for run in report["runs"]:
        # An untrained model predicts almost zero, so the error is the variance of the noise.
        assert all(loss == pytest.approx(1, abs=0.5) for loss in run["held_out_loss"].values())
    # The runs have the same weights and batches at the start.
    first = [
        json.loads((settings.state / name / "train.json").read_text())["result"]["first_loss"]
        for name in ("adamw-0.004", "muon-0.001")
    ]
    assert first[0] == pytest.approx(first[1], rel=0.05)

    # A further learning rate trains that run only.
    trained = settings.state / "adamw-0.004" / "checkpoint.safetensors"
    written = trained.stat().st_mtime_ns
    more = dataclasses.replace(settings, muon_learning_rates=(1e-3, 2e-3))
    again = json.loads(compare(more, tiles()).read_text())
    assert again["runs"][:2] == report["runs"]
    assert trained.stat().st_mtime_ns == written
    rows = [line for line in optimizer_table(again).splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[:2] for row in rows[1:]] == [
        ["| AdamW", "0.004"],
        ["| Muon", "0.001"],
        ["| Muon", "0.002"],
    ]
    with pytest.raises(ValueError, match=r"state: got .*'steps': 2.* expected .*'steps': 4"):
        compare(dataclasses.replace(settings, steps=4), tiles())


@pytest.mark.parametrize("changes", [{"steps": 3}, {"learning_rate": 0.0}, {"batch_size": 0}])
def test_an_error_names_the_setting_out_of_range(tmp_path: Path, changes: dict[str, int]) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name}: got"):
        compare(Settings(state=tmp_path, **changes), tiles())
