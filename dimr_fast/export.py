"""Export a training run as a model folder to share: `dimr-fast export`.

The folder holds EMA weights or another average, configuration, recipe and scores.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dimr_fast.checkpoint import load_checkpoint, load_model, local_model, save_model
from dimr_fast.data.scaling import LatentScale
from dimr_fast.errors import CheckpointError
from dimr_fast.hub.mixin import CONFIG
from dimr_fast.hub.space import MODEL, require_gradio, write_space
from dimr_fast.training.averages import LONGEST, average_weights
from dimr_fast.utils.files import write_folder
from dimr_fast.utils.validation import require, require_fields

PATH_SETTINGS = ("output", "checkpoint")
"""Settings that are private paths and are removed from the recipe."""
ABSOLUTE_FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^/\s][^/\n]*/)+")
"""Regular expression for the folders of absolute paths in free text (URLs excluded)."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of an export."""

    checkpoint: Path
    """A training checkpoint, whose EMA weights are exported. The files beside it are used too: the
    recipe in `train.json` and the picture `loss.png`."""
    output: Path
    """Output folder, whose name is the model's. It must not exist yet."""
    average_length: float | None = None
    """Export an average of the weights of this relative length, 0..0.28, instead of EMA weights.
    The run must have kept averages: see average_steps in docs/training.md."""
    average_step: int | None = None
    """End the average at this earlier step, one at which the run stored its averages: a worse model
    that guides the last one (see docs/distillation.md). None: at the checkpoint's step."""
    scores: Path | None = None
    """A JSON file of scores with their recipe, such as `evaluation.json` or `demo.json`."""
    license: str | None = None
    """Licence of the weights, as the Hub names it: apache-2.0, cc-by-4.0, …"""
    pictures: tuple[Path, ...] = ()
    """Further pictures for the model card, such as a grid of samples."""
    space: bool = False
    """Write a folder that runs as a Hugging Face Space: a page that draws, with the model in its
    folder `model`. The checkpoint may then also be the folder of a saved model."""

    def validate(self) -> None:
        """Raise ValueError naming a setting that is out of range."""
        missing = [str(path) for path in self.pictures if not path.is_file()]
        length = self.average_length
        require_fields(
            self,
            pictures=(not missing, f"files; missing: {', '.join(missing)}"),
            average_length=(length is None or 0 < length < LONGEST, f"0 < length < {LONGEST}"),
            average_step=(
                self.average_step is None or length is not None,
                "none without average_length",
            ),
        )


def export(config: ExportConfig) -> Path:
    """Write the model of a run as a folder with its card, or as a Space; return the folder.

    The recipe on the card is the run's `train.json` or, without one, the checkpoint's metadata.
    Raises, before anything is written, ValueError for an unusable setting or scores,
    CheckpointError for an unusable checkpoint, FileExistsError where there is an output already,
    DataUnavailableError where Gradio is missing for a Space, and OSError where the output cannot be
    written.
    """
    config.validate()
    if config.output.exists():
        raise FileExistsError(f"{config.output} exists already; choose another output")
    if config.space:
        require_gradio()
        write_folder(config.output, lambda folder: _fill_space(config, folder))
    else:
        _export_model(config, config.output)
    return config.output


def _fill_space(config: ExportConfig, folder: Path) -> None:
    """Write the files of a Space, and the model, which may be saved already."""
    saved = local_model(config.checkpoint)
    if (saved / CONFIG).is_file():
        for name in ("average_length", "scores", "pictures"):
            given = getattr(config, name)
            require(not given, name, given, f"none, as {saved} is a saved model")
        shutil.copytree(saved, folder / MODEL)
    else:
        _export_model(config, folder / MODEL)
    if isinstance(load_model(folder / MODEL).scale, LatentScale):
        raise ValueError(
            "space: got a model of latents, expected one of pixels: a Space has no autoencoder"
        )
    write_space(folder, config.output.absolute().name, config.license)


def _export_model(config: ExportConfig, output: Path) -> None:
    if config.checkpoint.is_dir():
        checkpoint = config.checkpoint / "checkpoint.safetensors"
        hint = f"; its checkpoint is {checkpoint}" if checkpoint.is_file() else ""
        raise CheckpointError(
            f"{config.checkpoint}: a folder, expected a checkpoint of training{hint}"
        )
    scores = None if config.scores is None else _read_json(config.scores)
    recipe = _recipe(config.checkpoint)
    trained = load_model(config.checkpoint)
    if config.average_length is not None:
        length, step = config.average_length, config.average_step
        trained.model.load_state_dict(average_weights(config.checkpoint, length, step))
        recipe["average_length"] = length
        if step is not None:
            recipe["average_step"] = step
    curve = config.checkpoint.parent / "loss.png"
    pictures = (*config.pictures, *([curve] if curve.is_file() else []))
    save_model(
        trained,
        output,
        recipe=_without_paths(recipe),
        scores=_without_paths(scores),
        license=config.license,
        pictures=pictures,
    )


def _recipe(checkpoint: Path) -> dict[str, Any]:
    record = checkpoint.parent / "train.json"
    if record.is_file():
        recipe = _read_json(record)
    else:
        # No tensor name starts with "/": only the metadata is read.
        _, metadata = load_checkpoint(checkpoint, "/")
        names = ("recipe", "step", "seconds")
        recipe = {name: metadata[name] for name in names if name in metadata}
    return recipe


def _without_paths(values: Any) -> Any:
    """Return the JSON value without path settings, and other absolute paths as file names only."""
    if isinstance(values, dict):
        return {name: _without_paths(v) for name, v in values.items() if name not in PATH_SETTINGS}
    if isinstance(values, list):
        return [_without_paths(value) for value in values]
    return ABSOLUTE_FOLDERS.sub("", values) if isinstance(values, str) else values


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: got no JSON ({error}), expected a JSON object") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got {type(values).__name__}, expected a JSON object")
    return values
