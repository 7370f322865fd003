"""Read a training run for the page, while it is trained or later."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dimr_fast.training.log import LOG
from dimr_fast.training.previews import SAMPLES
from dimr_fast.training.run import CONFIG

Curve = tuple[list[int], list[float]]
"""Steps and values."""

SUMMARY = "train.json"
"""File that a run writes at its end."""
POINTS = 500
"""Maximum number of points of a curve."""
GRIDS = 12
"""Maximum number of grids, the newest ones."""
CURVES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "images_per_second": "Images per second",
    "frechet_distance": "Fréchet distance",
}
"""Figures of the log that are shown, and their titles."""


@dataclass(frozen=True)
class RunState:
    """What a run has written so far.

    `curves` holds, for each of `CURVES`, the steps and values that are finite. `grids` are the
    newest grids, the last one first.
    """

    curves: dict[str, Curve]
    grids: list[Path]
    summary: str


def check_run(folder: Path) -> None:
    """Raise ValueError unless `folder` holds a training run, maybe one that has just begun."""
    if not ((folder / CONFIG).is_file() or (folder / LOG).is_file()):
        raise ValueError(f"run: got {folder}, expected the folder of a training run, with {CONFIG}")


def read_run(folder: Path) -> RunState:
    """Read log and grids of a run; a file that is being written, or is missing, is left out."""
    try:
        lines = (folder / LOG).read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    records = [record for record in map(_record, lines) if record is not None]
    curves = {name: _curve(records, name) for name in CURVES}
    grids = sorted((folder / SAMPLES).glob("*.png"), reverse=True)[:GRIDS]
    logged, ended = _changed(folder / LOG), _changed(folder / SUMMARY)
    # A run that was resumed after its end logs again.
    state = "the run has ended" if ended >= logged else f"logged {_ago(time.time() - logged)} ago"
    return RunState(curves, grids, _summary(curves, state))


def grid_pictures(grids: list[Path]) -> list[tuple[Image.Image, str]]:
    """Return the pictures of grids and their steps in words, without those that are unreadable."""
    found = []
    for path in grids:
        try:
            with Image.open(path) as picture:
                found.append((picture.convert("RGB"), f"step {int(path.stem):,}"))
        except (OSError, ValueError):
            continue
    return found


def curve_limits(values: list[float]) -> list[float] | None:
    """Return limits of the axis that show the values after the first tenth, None without values.

    A loss falls so steeply at the start that nothing else would be seen.
    """
    if not values:
        return None
    later = values[len(values) // 10 :]
    margin = 0.05 * (max(later) - min(later)) or 0.05 * abs(max(later)) or 1.0
    return [min(values) - margin, max(later) + margin]


def _changed(path: Path) -> float:
    """Return when a file was written, 0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _record(line: str) -> dict[str, float] | None:
    """Return the figures of a line, or None where it is incomplete."""
    try:
        found = json.loads(line)
        return found if isinstance(found["step"], int) else None
    except (KeyError, TypeError, ValueError):
        return None


def _curve(records: list[dict[str, float]], name: str) -> Curve:
    points = [
        (int(record["step"]), float(record[name]))
        for record in records
        if isinstance(record.get(name), int | float) and math.isfinite(record[name])
    ]
    # The last point stays: it is the newest.
    points = points[:: -max(1, math.ceil(len(points) / POINTS))][::-1]
    return [step for step, _ in points], [value for _, value in points]


def _summary(curves: dict[str, Curve], state: str) -> str:
    """Return the newest figures in a sentence."""
    steps, losses = curves["loss"]
    if not steps:
        return "The run has not logged a finite loss yet."
    figures = [f"Step {steps[-1]:,}", f"loss {losses[-1]:.4f}"]
    for name, words in (
        ("images_per_second", "{:,.0f} images/s"),
        ("frechet_distance", "Fréchet distance {:.1f}"),
    ):
        figures += [words.format(value) for value in curves[name][1][-1:]]
    return " · ".join([*figures, state])


def _ago(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
