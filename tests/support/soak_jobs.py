"""Small jobs to disturb: their commands, how to resume them, and what they write."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dimr_fast.training import CHECKPOINT
from tests.support.autoencoder import save_autoencoder
from tests.support.image_files import noise, save

MEASURED = {"seconds", "images_per_second", "mfu", "cached"}
"""Entries of JSON files and metadata that depend on the clock or on an earlier attempt."""
REPORTS = {
    "averages": "no averages of step {}:",
    "samples": "no samples at step {}:",
    "checkpoint": "no milestone at step {}:",
    "cache": "statistics of the reference not cached",
    "log.jsonl": "not logged:",
}
"""What a job says of an output that it could not write and can go on without."""


@dataclass(frozen=True)
class Job:
    """A command that writes to `output`, with `processes` processes.

    `resumed` changes its words where an earlier attempt has left something.
    """

    name: str
    words: tuple[str, ...]
    output: Path
    processes: int = 1
    resumed: Callable[[Path], tuple[str, ...]] = lambda output: ()
    report: str | None = None
    """File that the job writes last, if the job is refused where it is finished."""

    def command(self) -> list[str]:
        """Return the words of the first or of the next attempt."""
        return [*self.words, "--output", str(self.output), *self.resumed(self.output)]

    def is_finished(self) -> bool:
        """Return whether the job is finished, and another attempt would be refused."""
        if self.report is None:
            return False
        try:
            return bool(json.loads((self.output / self.report).read_text()).get("finished", True))
        except (OSError, ValueError):
            return False


def _resume_training(output: Path) -> tuple[str, ...]:
    return ("--resume",) if (output / CHECKPOINT).exists() else ()


def make_jobs(inputs: Path, output: Path) -> list[Job]:
    """Write what the jobs read to `inputs`; return them, each of a second or two."""
    for index in range(20):
        save(inputs / "images" / "ab"[index % 2] / f"{index}.png", noise(16, 16, index))
        save(inputs / "real" / f"{index}.png", noise(16, 16, 100 + index))
    autoencoder = save_autoencoder(inputs / "autoencoder", blocks=2)
    settings = {
        "data": inputs / "images",
        "preset": "tiny",
        "minutes": "none",
        "steps": 12,
        "batch_size": 8,
        "precision": "fp32",
        "device": "cpu",
        "log_steps": 1,
        "milestone_steps": 4,
        "average_steps": 4,
        "sample_steps": 8,
    }
    train = ["train"]
    for name, value in settings.items():
        train += ["--set", f"{name}={value}"]
    images = str(inputs / "images")
    extract = ["extract", "--images", images, "--autoencoder", str(autoencoder), "--device", "cpu"]
    extract += ["--image-size", "16", "--shard-size", "1", "--processes", "1"]
    sample = ["sample", "--per-class", "3", "--batch-size", "2", "--precision", "fp32"]
    sample += ["--device", "cpu", "--formats", "grid", "png", "npz"]
    evaluate = ["evaluate", "--images", str(inputs / "images" / "a"), "--device", "cpu"]
    evaluate += ["--reference", str(inputs / "real"), "--cache", str(output / "cache")]
    return [
        Job("training", tuple(train), output, resumed=_resume_training),
        Job("extraction", tuple(extract), output),
        Job("training, 2 processes", tuple(train), output, 2, _resume_training),
        Job("sampling", tuple(sample), output, report="sample.json"),
        Job("evaluation", tuple(evaluate), output, report="evaluation.json"),
    ]


def contents(folder: Path) -> dict[str, Any]:
    """Return the content of every file, without what is measured.

    Unfinished files count too, except those in a cache, which other jobs may be writing.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        skipped = path.name == ".lock" or (name.startswith("cache/.") and ".part/" in name)
        if path.is_file() and not skipped:
            found[name] = _content(path)
    return found


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        return _without_measured(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return {line["step"]: _without_measured(line) for line in lines}
    if path.suffix == ".safetensors":
        with safe_open(path, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            metadata = _without_measured(file.metadata())
        return metadata, {n: (str(x.dtype), x.shape, x.tobytes()) for n, x in tensors.items()}
    return path.read_bytes()


def _without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_measured(v) for k, v in value.items() if k not in MEASURED}
    return value


def lost(expected: dict[str, Any], found: dict[str, Any], said: str) -> list[str]:
    """Return how the files of a disturbed job differ from those of an undisturbed one.

    An output that the job can do without may be missing if the job has `said` so.
    """
    differences = [f"{name}: is left over" for name in found.keys() - expected.keys()]
    for name, content in expected.items():
        kind = "checkpoint" if name.startswith("checkpoint-") else name.partition("/")[0]
        step = "".join(filter(str.isdecimal, name)).lstrip("0")
        optional = kind in REPORTS and REPORTS[kind].format(step) in said
        if kind == "checkpoint":
            optional |= f"no checkpoint at step {step}:" in said
        if name not in found:
            differences += [] if optional else [f"{name}: is missing"]
        elif name == "log.jsonl" and optional:
            wrong = [step for step, line in found[name].items() if content.get(step) != line]
            differences += [f"{name}: differs at steps {wrong}"] if wrong else []
        elif content != found[name]:
            differences.append(f"{name}: differs")
    return differences


def clear(folder: Path) -> None:
    """Remove what is in a folder."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
