"""Tests of the comparison of recipes: paired runs that resume, and their table."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.ablation.recipes import Settings, compare
from benchmarks.ablation.report import recipe_table
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


@pytest.mark.slow
def test_runs_are_scored_once_and_shown_in_a_table(tmp_path: Path) -> None:
    settings = Settings(
        state=tmp_path / "state",
        output=tmp_path,
        arms=("learning_rate=4e-3", "optimizer=muon learning_rate=1e-3"),
        steps=2,
        batch_size=2,
        images=6,
        timed_steps=1,
    )
    path = compare(settings, tiles())
    report = json.loads(path.read_text())
    runs = {run["arm"]: run for run in report["runs"]}
    assert set(runs) == set(settings.arms)
    for run in runs.values():
        assert run["commit"] == report["commit"]
        # An untrained model predicts almost zero, so the error is the variance of the noise.
        assert run["half_way_loss"] == pytest.approx(1, abs=0.5)
        assert run["held_out_loss"] == pytest.approx(1, abs=0.5)
        assert run["frechet"] > 0
        assert 0 <= run["precision"] <= 1
    # The runs have the same weights and batches at the start.
    first = [
        json.loads((settings.state / name / "train.json").read_text())["result"]["first_loss"]
        for name in ("learning_rate=4e-3-0", "optimizer=muon_learning_rate=1e-3-0")
    ]
    assert first[0] == pytest.approx(first[1], rel=0.05)

    # A further seed trains that run only, and the table has the mean of both.
    trained = settings.state / "learning_rate=4e-3-0" / "checkpoint.safetensors"
    written = trained.stat().st_mtime_ns
    more = dataclasses.replace(settings, arms=("learning_rate=4e-3",), seeds=(0, 1))
    again = json.loads(compare(more, tiles()).read_text())
    assert [run for run in again["runs"] if run["seed"] == 0] == list(runs.values())
    assert trained.stat().st_mtime_ns == written
    rows = [line.split(" | ") for line in recipe_table(again).splitlines() if "`" in line]
    seeds = {row[0]: row[1] for row in rows if row[0].startswith("| ")}
    assert seeds == {
        "| `learning_rate=4e-3`": "2",
        "| `optimizer=muon learning_rate=1e-3`": "1",
    }
    with pytest.raises(ValueError, match=r"state: got .*'steps': 2.* expected .*'steps': 4"):
        compare(dataclasses.replace(settings, steps=4), tiles())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"steps": 3}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"images": 1}, "images"),
        ({"arms": ("seed=1",)}, "arms"),
        ({"arms": ("min_snr=0",)}, "min_snr"),
    ],
)
def test_an_error_names_the_setting_out_of_range(
    tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=f"{name}: got"):
        compare(Settings(state=tmp_path, **changes), tiles())
