"""Tests of the comparison of distilled models: runs that resume, and their table."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.ablation.distillation import Settings, compare
from benchmarks.ablation.report import cost_of_an_image, distillation_table
from tests.benchmarks.test_recipes import tiles


@pytest.mark.slow
def test_students_are_scored_once_and_shown_beside_their_teacher(tmp_path: Path) -> None:
    settings = Settings(
        state=tmp_path / "state",
        output=tmp_path,
        arms=("evaluations=1 batch_size=2", "evaluations=2 batch_size=2"),
        steps=2,
        images=6,
        rounds=1,
    )
    report = json.loads(compare(settings, tiles()).read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert {name: row["evaluations"] for name, row in rows.items()} == {
        "teacher, by default": 8,
        "teacher, default of earlier versions": 50,
        "evaluations=1 batch_size=2": 1,
        "evaluations=2 batch_size=2": 2,
    }
    rates = [
        row["images_per_second"]
        for row in sorted(report["rows"], key=lambda row: row["evaluations"])
    ]
    assert rates == sorted(rates, reverse=True)

    # A finished student is added; the others are neither trained nor drawn again.
    student = settings.state / "evaluations=1_batch_size=2" / "checkpoint.safetensors"
    more = dataclasses.replace(settings, arms=settings.arms[1:], students=(student,))
    again = json.loads(compare(more, tiles()).read_text())
    found = {row["name"]: row for row in again["rows"]}
    assert (
        found["evaluations=2 batch_size=2"]["frechet"]
        == rows["evaluations=2 batch_size=2"]["frechet"]
    )
    assert found["evaluations=1_batch_size=2"]["steps"] == 2
    assert "| evaluations=1_batch_size=2 | 1 | 2 |" in distillation_table(again).replace("`", "")


def test_a_sentence_says_what_an_image_costs() -> None:
    rows = [
        {"name": name, "evaluations": evaluations, "frechet": distance, "images_per_second": rate}
        for name, evaluations, distance, rate in (
            ("teacher, by default", 8.0, 120.4, 104.6),
            ("teacher, default of earlier versions", 50.0, 121.4, 14.4),
            ("evaluations=2", 2.0, 140.0, 300.0),
            ("demo-distilled", 2.0, 130.6, 301.2),
        )
    ]
    text = cost_of_an_image({"images": 1536, "threads": 1, "rows": rows})
    assert text.startswith("On 1 thread the packaged model draws 105 images a second with 8 ")
    assert "its distilled form 301 images a second with 2 evaluations" in text
    assert "guidance 14.4 images" in text
    assert text.endswith("distance of 121 (1,536 samples).")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"arms": ("steps=5",)}, r"arms: got 'steps=5', expected none that changes steps"),
        ({"arms": ("evaluations=3",)}, "teacher_steps: got 8, expected a positive multiple"),
        ({"steps": 0}, "steps: got 0"),
        ({"rounds": 0}, "rounds: got 0"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, changes: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(Settings(state=tmp_path), **changes).validate()
