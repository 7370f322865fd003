"""Reading a training run for the page, while files are written; without Gradio."""

import json
import math
import os
from pathlib import Path

import pytest
from PIL import Image

from dimr_fast.web.runs import POINTS, check_run, curve_limits, grid_pictures, read_run
from tests.support.training import small_run, train_on_plain_images


def write_log(folder: Path, lines: list[dict[str, float]], end: str = "") -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines) + end
    (folder / "log.jsonl").write_text(text)


def test_a_run_is_shown_with_its_figures_and_grids(tmp_path: Path) -> None:
    """The run is a real one, so that names of files and figures are those of training."""
    train_on_plain_images(small_run(tmp_path, log_steps=2, sample_steps=4))
    check_run(tmp_path)
    run = read_run(tmp_path)
    steps, losses = run.curves["loss"]
    assert steps == [2, 4, 6, 8]
    assert all(loss > 0 for loss in losses)
    assert run.curves["learning_rate"][0] == steps
    assert min(run.curves["images_per_second"][1]) > 0
    assert run.curves["frechet_distance"] == ([], [])
    (newest, words), (_, earlier) = grid_pictures(run.grids)
    assert (words, earlier) == ("step 8", "step 4")
    assert newest.size > (16, 16)
    assert run.summary.startswith(f"Step 8 · loss {losses[-1]:.4f} · ")
    assert run.summary.endswith(" · the run has ended")


def test_lines_that_are_incomplete_or_not_finite_are_left_out(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": math.nan},
        {"step": 2, "frechet_distance": 99.5},
        {"loss": 1.0},
    ]
    write_log(tmp_path, lines, '[]\n"step"\n{"step": 3, "lo')
    run = read_run(tmp_path)
    assert run.curves["loss"] == ([1], [0.5])
    assert run.curves["frechet_distance"] == ([2], [99.5])
    assert "Fréchet distance 99.5 · logged" in run.summary


def test_a_long_log_is_thinned_out_and_keeps_its_end(tmp_path: Path) -> None:
    write_log(tmp_path, [{"step": step, "loss": 1 / step} for step in range(1, 2801)])
    steps, losses = read_run(tmp_path).curves["loss"]
    assert POINTS / 2 <= len(steps) <= POINTS
    assert (steps[-1], losses[-1]) == (2800, 1 / 2800)
    assert steps == sorted(steps)


def test_a_run_that_was_resumed_after_its_end_goes_on(tmp_path: Path) -> None:
    write_log(tmp_path, [{"step": 1, "loss": 0.5}])
    (tmp_path / "train.json").write_text("{}")
    now = (tmp_path / "log.jsonl").stat().st_mtime
    os.utime(tmp_path / "train.json", (now + 1, now + 1))
    assert read_run(tmp_path).summary.endswith("the run has ended")
    os.utime(tmp_path / "train.json", (now - 1, now - 1))
    assert "logged" in read_run(tmp_path).summary
    os.utime(tmp_path / "log.jsonl", (now - 7200, now - 7200))
    (tmp_path / "train.json").unlink()
    assert read_run(tmp_path).summary.endswith("logged 2 h ago")


def test_a_run_that_has_just_begun_has_no_figures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run: got .*, expected the folder of a training run"):
        check_run(tmp_path)
    (tmp_path / "config.yaml").write_text("{}")
    check_run(tmp_path)
    run = read_run(tmp_path)
    assert run.summary == "The run has not logged a finite loss yet."
    assert run.grids == []


def test_a_grid_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (4, 3), "red").save(tmp_path / "samples" / "00000100.png")
    (tmp_path / "samples" / "00000200.png").write_bytes(b"\x89PNG half")
    (tmp_path / "samples" / "00000300.png").symlink_to("/etc/passwd")
    pictures = grid_pictures(read_run(tmp_path).grids)
    assert [(picture.size, words) for picture, words in pictures] == [((4, 3), "step 100")]


def test_the_axis_shows_the_values_after_the_steep_start() -> None:
    low, high = curve_limits([100.0, *[1 + 1 / n for n in range(1, 20)]]) or (0, 0)
    assert low < 1 + 1 / 19
    assert 1.5 < high < 2
    assert curve_limits([]) is None
    low, high = curve_limits([2.0]) or (0, 0)
    assert low < 2 < high
