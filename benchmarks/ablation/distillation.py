"""Distil the packaged model by variants of the recipe, and score samples of each student.

    python -m benchmarks.ablation.distillation --state FOLDER [--arms WORDS …]

An arm is the recipe `distill` for a fixed number of steps with changes that
`dimr-fast distill --set` takes, like "evaluations=1". All have the same weights at the start,
batches and noise. Interrupted (Ctrl-C), the same command resumes. `--students FILE …` adds finished
students. The teacher is scored with its default sampling and with that of earlier versions; images
a second of all are measured at the end, in alternation, and need a quiet machine.
"""

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.ablation.recipes import kept, with_fixed
from benchmarks.ablation.report import CODE, DISTILLATION_RESULT
from benchmarks.model.sampling_curve import sampler_of, score
from benchmarks.utils import machine
from dimr_fast.checkpoint import demo_model, load_model
from dimr_fast.data.arrays import ImageArray
from dimr_fast.data.tiles import Tiles, load_tiles
from dimr_fast.evaluation import EfficientNetLite0Features, TensorImages, compute_statistics
from dimr_fast.sampling import ImageSampler, balanced_labels
from dimr_fast.training import CHECKPOINT, TrainConfig, distillation_config, train
from dimr_fast.utils.device import keep_freed_memory
from dimr_fast.utils.files import write_json
from dimr_fast.utils.validation import require_fields

TEACHER = {
    "teacher, by default": {},
    "teacher, default of earlier versions": {
        "solver": "dpm++",
        "spacing": "time",
        "steps": 25,
        "guidance": 1.0,
    },
}
"""Settings of the samples of the teacher."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the comparison."""

    state: Path
    """Folder of the runs, from which the same command resumes."""
    output: Path = DISTILLATION_RESULT.parent
    """Folder of `distillation.json`."""
    arms: tuple[str, ...] = (
        "evaluations=1",
        "evaluations=2",
        "evaluations=4",
        "evaluations=2 learning_rate=2e-3",
        "evaluations=2 learning_rate=8e-3",
        "evaluations=2 optimizer=adamw learning_rate=1e-3",
        "evaluations=2 teacher_steps=16",
    )
    """Changes of the recipe."""
    students: tuple[Path, ...] = ()
    """Finished students: checkpoints, or folders of saved models."""
    steps: int = 300
    images: int = 1536
    """Samples that are scored, with balanced classes."""
    rounds: int = 5
    """Of timing."""

    def validate(self) -> None:
        """Raise ValueError naming a setting that is out of range."""
        require_fields(
            self,
            steps=(self.steps > 0, "a positive number"),
            images=(self.images > 1, "2 or more"),
            rounds=(self.rounds > 0, "a positive number"),
        )
        for arm in self.arms:
            self.run_of(arm)

    def run_of(self, arm: str) -> TrainConfig:
        """Return the settings of a run. Raises ValueError naming an unusable setting of the arm."""
        fixed: dict[str, Any] = {
            "minutes": None,
            "steps": self.steps,
            "warmup_steps": self.steps // 10,
            "device": "cpu",
        }
        words = arm.split()
        config = distillation_config(None, self.state / "_".join(words), words)
        return with_fixed(arm, config, fixed)


def compare(settings: Settings, tiles: Tiles | None = None) -> Path:
    """Distil and score all runs that are not yet; return the path of `distillation.json`.

    `tiles` replace those of the installed picture. Raises ValueError for a setting out of range,
    KeyboardInterrupt after a signal has ended a run, and DataUnavailableError without the tiles.
    """
    settings.validate()
    keep_freed_memory()
    tiles = load_tiles() if tiles is None else tiles
    features = EfficientNetLite0Features()
    reference = compute_statistics(features, TensorImages(tiles.val_images, "held out"))
    labels = balanced_labels(settings.images, len(tiles.classes))
    draws: dict[str, ImageSampler] = {}
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str, weights: Path, place: Path, sampling: dict[str, Any]) -> None:
        trained = load_model(weights)
        draws[name] = sampler_of(trained, sampling, {})
        scores = kept(
            place, lambda: score(draws[name], labels, features, reference) | training_of(weights)
        )
        rows[name] = {"name": name, **scores}
        print(json.dumps(rows[name]), flush=True)

    for number, (name, sampling) in enumerate(TEACHER.items()):
        add(name, demo_model(), settings.state / f"teacher-{number}.json", sampling)
    for arm in settings.arms:
        config = settings.run_of(arm)
        if not (config.output / "scores.json").exists():
            images = ImageArray(tiles.train_images, tiles.train_labels, tiles.classes)
            resume = (config.output / CHECKPOINT).exists()
            if train(config, examples=images, resume=resume).interrupted:
                raise KeyboardInterrupt
        add(arm, config.output / CHECKPOINT, config.output / "scores.json", {})
    for student in settings.students:
        folder = student if student.is_dir() else student.parent
        add(folder.name, student, settings.state / f"student-{folder.name}.json", {})
    for name, rate in rates(draws, len(tiles.classes), settings.rounds).items():
        rows[name]["images_per_second"] = rate
    result = settings.output / DISTILLATION_RESULT.name
    report = {
        **machine.description(*CODE),
        "steps": settings.steps,
        "images": settings.images,
        "features": features.recipe,
        "rows": list(rows.values()),
    }
    write_json(result, report)
    return result


def training_of(weights: Path) -> dict[str, Any]:
    """Return steps and seconds of the run that made a checkpoint or the folder of a saved model."""
    if weights.is_dir():
        run = json.loads((weights / "config.json").read_text())["recipe"]
    else:
        run = json.loads((weights.parent / "train.json").read_text())
    return {name: run["result"][name] for name in ("steps", "seconds")}


def rates(draws: dict[str, ImageSampler], classes: int, rounds: int) -> dict[str, float]:
    """Return the median images a second of each sampler for a batch of 64, taking turns."""
    labels = balanced_labels(64, classes)
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    for _ in range(rounds + 1):
        for name, draw in draws.items():
            begun = time.monotonic()
            draw(labels)
            seconds[name].append(time.monotonic() - begun)
    # The first call of each is slower.
    return {name: len(labels) / statistics.median(times[1:]) for name, times in seconds.items()}


if __name__ == "__main__":
    print("wrote", compare(tyro.cli(Settings)))
