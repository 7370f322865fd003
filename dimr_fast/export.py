"""A training run as a model to share: its EMA weights, configuration, recipe and scores."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dimr_fast.checkpoint import CheckpointError, load_checkpoint, load_model, save_model
from dimr_fast.config import require_fields

PLACES = ("output", "checkpoint")
"""Settings that only say where files lay, which is nobody else's business."""
FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^/\s][^/\n]*/)+")
"""The folders of an absolute path, with or without spaces, anywhere in a text but in a URL."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which run to share, and what to say of it."""

    checkpoint: Path
    """A checkpoint that training wrote; its EMA weights are exported. What lies beside it is used:
    the recipe in `train.json`, the picture `loss.png`."""
    output: Path
    """The model's folder, whose name is the model's; must not be there yet."""
    scores: Path | None = None
    """A JSON file of scores with their recipe, such as `evaluation.json` or `demo.json`."""
    license: str | None = None
    """Licence of the weights, as the Hub names it: apache-2.0, cc-by-4.0, …"""
    pictures: tuple[Path, ...] = ()
    """Further pictures for the model card, such as a grid of samples."""

    def validate(self) -> None:
        """ValueError naming a setting that is out of range."""
        missing = [str(path) for path in self.pictures if not path.is_file()]
        require_fields(self, pictures=(not missing, f"files; not there: {', '.join(missing)}"))


def export(config: ExportConfig) -> Path:
    """Write the model of a run as a folder with its card; returns the folder.

    The recipe on the card is the run's `train.json` or, without one, what the checkpoint itself
    says. Raises, before anything is written, ValueError for an unusable setting or scores,
    CheckpointError for an unusable checkpoint, FileExistsError where there is an output already,
    and OSError where it cannot be written.
    """
    config.validate()
    if config.output.exists():
        raise FileExistsError(f"{config.output} exists already; choose another output")
    if config.checkpoint.is_dir():
        raise CheckpointError(f"{config.checkpoint}: a folder, expected a checkpoint of training")
    scores = None if config.scores is None else _read_json(config.scores)
    recipe = _recipe(config.checkpoint)
    curve = config.checkpoint.parent / "loss.png"
    pictures = (*config.pictures, *([curve] if curve.is_file() else []))
    save_model(
        load_model(config.checkpoint),
        config.output,
        recipe=_without_places(recipe),
        scores=_without_places(scores),
        license=config.license,
        pictures=pictures,
    )
    return config.output


def _recipe(checkpoint: Path) -> dict[str, Any]:
    record = checkpoint.parent / "train.json"
    if record.is_file():
        recipe = _read_json(record)
    else:
        # No tensor is called so: only the metadata is read.
        _, said = load_checkpoint(checkpoint, "/")
        recipe = {name: said[name] for name in ("recipe", "step", "seconds") if name in said}
    return recipe


def _without_places(values: Any) -> Any:
    """The same JSON value, with no more of other paths than the last name."""
    if isinstance(values, dict):
        return {name: _without_places(v) for name, v in values.items() if name not in PLACES}
    if isinstance(values, list):
        return [_without_places(value) for value in values]
    return FOLDERS.sub("", values) if isinstance(values, str) else values


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: got no JSON ({error}), expected a JSON object") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got {type(values).__name__}, expected a JSON object")
    return values
