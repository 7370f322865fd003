"""Read and write training checkpoints and model folders; read weights of every kind of file."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from dimr_fast.config import DiMRConfig, preset_of
from dimr_fast.data.scaling import (
    PUBLISHED_PIXELS,
    LatentScale,
    Scale,
    scale_from_dict,
    scale_to_dict,
)
from dimr_fast.diffusion import ScheduleName
from dimr_fast.errors import CheckpointError
from dimr_fast.hub.mixin import CONFIG, WEIGHTS, canonical, read_config
from dimr_fast.hub.published import (
    COUNTER,
    is_published_run,
    load_published,
    load_published_run,
)
from dimr_fast.model import DiMR
from dimr_fast.utils.files import write_folder
from dimr_fast.utils.tensors import (
    crc32,
    how_to_convert,
    read_tensors,
    to_storable,
    write_tensors,
)

__all__ = [
    "EMA_PREFIX",
    "PACKAGED",
    "CheckpointError",
    "StoredWeights",
    "TrainedModel",
    "demo_model",
    "load_checkpoint",
    "load_model",
    "load_published",
    "notes_of",
    "published_training",
    "read_weights",
    "save_checkpoint",
    "save_model",
]

EMA_PREFIX = "ema."
SAFETENSORS = ".safetensors"
INTERVALS = "log_snr"
"""Spacing of the intervals of a distilled model's evaluations, stored beside their number. Students
of an earlier method do not have it."""
PACKAGED = ("demo", "demo-distilled")
"""Models that come with the package, by the names that `load_model` takes. The second is distilled
from the first and draws in two evaluations."""
_CHECKSUMS = "crc32"
_BARE_WEIGHTS = "not a checkpoint of a DiMR model, but weights without its configuration"


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors with a checksum each, and JSON values as metadata, to `path`, atomically.

    Raises OSError where it cannot be written; then the old file stays.
    """
    stored = to_storable(tensors)
    checksums = {name: crc32(tensor) for name, tensor in stored.items()}
    values = {**metadata, _CHECKSUMS: checksums}
    write_tensors(path, stored, {name: json.dumps(value) for name, value in values.items()})


def load_checkpoint(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors (to the CPU) and the metadata of a file that `save_checkpoint` wrote.

    Only tensors whose names begin with `prefix` are read, under their full names. Raises
    CheckpointError where the file is missing, damaged or was written by something else.
    """
    tensors, text = read_tensors(path, prefix)
    try:
        metadata = {name: json.loads(value) for name, value in text.items()}
    except ValueError as error:
        raise CheckpointError(f"{path}: {_BARE_WEIGHTS}; {how_to_convert(path)}") from error
    # Files of early versions have no checksums.
    checksums = metadata.pop(_CHECKSUMS, None)
    for name, tensor in tensors.items() if checksums is not None else ():
        if checksums.get(name) != crc32(tensor):
            raise CheckpointError(f"{path}: {name} is damaged, its checksum is another")
    return tensors, metadata


@dataclass(frozen=True)
class TrainedModel:
    """A model to sample from, and how it was trained.

    `classes` and `scale` are those of its training data, `schedule` is its noise schedule, which
    also says what its condition is. `defaults` names the settings it is sampled with by default:
    see `SamplerConfig`. `evaluations` is the number of network evaluations that a distilled model
    draws an image in, None for other models.
    """

    model: DiMR
    classes: tuple[str, ...]
    scale: Scale
    schedule: ScheduleName = "discrete"
    defaults: Literal["published"] | None = None
    evaluations: int | None = None


def load_model(path: Path) -> TrainedModel:
    """Load the model of a training checkpoint or of a folder, on the CPU and in evaluation mode.

    From a training checkpoint it loads the EMA weights. A folder must have been written by
    `save_model`, `dimr-fast export` or `dimr-fast convert`. `demo` and `demo-distilled` are the
    packaged models, unless there is such a file or folder. Raises CheckpointError where the files
    are unusable, do not fit together or do not state the model's classes, input scale and noise
    schedule.
    """
    path = local_model(path)
    if path.is_dir():
        model, notes = DiMR.from_folder(path)
        return _trained_model(path, model, notes, schedule_of(notes))
    tensors, metadata = load_checkpoint(path, EMA_PREFIX)
    if "config" not in metadata:
        raise CheckpointError(f"{path}: {_BARE_WEIGHTS}; {how_to_convert(path)}")
    try:
        config = DiMRConfig.from_dict(metadata["config"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of a DiMR model ({error})") from error
    weights = {name.removeprefix(EMA_PREFIX): value.clone() for name, value in tensors.items()}
    model = DiMR.from_weights(config, weights, path)
    # Runs of earlier versions knew no other schedule.
    return _trained_model(path, model, metadata, metadata.get("schedule", "discrete"))


def schedule_of(notes: Mapping[str, Any]) -> Any:
    """Return the noise schedule in the notes of a model folder, or None where it is unknown.

    Folders of earlier versions do not name it. Models of latents and exported runs, which have a
    recipe, were trained with "discrete"; converted pixel models may have had any.
    """
    latents = isinstance(notes.get("scale"), dict) and notes["scale"].get("kind") == "latents"
    return notes.get("schedule", "discrete" if latents or "recipe" in notes else None)


def published_training(model: DiMRConfig) -> dict[str, Any]:
    """Return how the published model of this configuration was trained, as notes of a folder.

    The inputs of published latent models are latents × 0.18215, with the discrete schedule; those
    of published pixel models are pixels in −1..1, with the VP-SDE. The result is empty for other
    models, whose training is unknown.
    """
    if model.channels == 4:
        scale, schedule = scale_to_dict(LatentScale()), "discrete"
    elif (preset_of(model) or "").startswith("DiMR-"):
        scale, schedule = scale_to_dict(PUBLISHED_PIXELS), "vp-sde"
    else:
        return {}
    return {"scale": scale, "schedule": schedule, "sampling_defaults": "published"}


def _trained_model(
    path: Path, model: DiMR, metadata: dict[str, Any], schedule: Any
) -> TrainedModel:
    """Return the model with the facts in its metadata, which must be complete."""
    if schedule is None:
        raise CheckpointError(
            f"{path}: its noise schedule is not recorded, and images drawn with another one are "
            "wrong; state it, and the scale of its pixels, when you convert it: dimr-fast convert "
            f"--input {path} --output FOLDER --schedule NAME --pixel-scale MEAN STD "
            f"(NAME: {' or '.join(get_args(ScheduleName))}; 127.5 127.5 means −1..1)"
        )
    if schedule not in get_args(ScheduleName):
        raise CheckpointError(
            f"{path}: schedule: got {schedule!r}, expected {' or '.join(get_args(ScheduleName))}"
        )
    defaults = metadata.get("sampling_defaults")
    if defaults not in (None, "published"):
        raise CheckpointError(
            f"{path}: sampling_defaults: got {defaults!r}, expected 'published' or none"
        )
    evaluations = metadata.get("evaluations")
    whole = isinstance(evaluations, int) and not isinstance(evaluations, bool)
    if not (evaluations is None or (whole and evaluations > 0)):
        raise CheckpointError(
            f"{path}: evaluations: got {evaluations!r}, expected a positive whole number or none"
        )
    if evaluations is not None and metadata.get("intervals") != INTERVALS:
        raise CheckpointError(
            f"{path}: distilled by the method of an earlier version; distil its teacher again: "
            "dimr-fast distill"
        )
    classes, scale = _classes_and_scale(path, metadata, model.config)
    return TrainedModel(model, classes, scale, schedule, defaults, evaluations)


def _classes_and_scale(
    path: Path, metadata: dict[str, Any], config: DiMRConfig
) -> tuple[tuple[str, ...], Scale]:
    """Read classes and scale from the metadata of a model."""
    try:
        classes, scale = metadata["classes"], scale_from_dict(metadata["scale"])
    except KeyError as error:
        raise CheckpointError(
            f"{path}: not a checkpoint of a DiMR model and its data (it lacks {error})"
        ) from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of a DiMR model ({error})") from error
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"{path}: classes: got {classes!r}, expected a list of names")
    if len(classes) != config.null_class:
        raise CheckpointError(
            f"{path}: classes: got {len(classes)} names, expected {config.null_class}, as the model"
        )
    return tuple(classes), scale


def notes_of(trained: TrainedModel) -> dict[str, Any]:
    """Return how the model was trained as the entries of its `config.json` that `load_model` reads.

    They are JSON values, for `DiMR.save_pretrained(config=…)`.
    """
    known = {
        "classes": list(trained.classes),
        "scale": scale_to_dict(trained.scale),
        "schedule": trained.schedule,
        "sampling_defaults": trained.defaults,
        "evaluations": trained.evaluations,
        "intervals": None if trained.evaluations is None else INTERVALS,
    }
    return {name: value for name, value in known.items() if value is not None}


def save_model(
    trained: TrainedModel,
    folder: Path,
    *,
    recipe: dict[str, Any] | None = None,
    scores: dict[str, Any] | None = None,
    license: str | None = None,
    pictures: Sequence[Path] = (),
) -> None:
    """Write a new folder that `load_model` and `DiMR.from_pretrained` read.

    It holds `config.json`, `model.safetensors` and a model card, `README.md`, which states
    `recipe` and `scores` (JSON values) and shows copies of `pictures`. `license` is the licence of
    the weights, by the Hub's identifier. The folder is written atomically. Raises FileExistsError
    where it exists already, and OSError where it cannot be written.
    """
    said = {"recipe": recipe, "scores": scores, "license": license}
    notes = notes_of(trained) | {name: value for name, value in said.items() if value is not None}
    card = {"name": folder.absolute().name, "pictures": [path.name for path in pictures]}

    def fill(unfinished: Path) -> None:
        for path in pictures:
            shutil.copy(path, unfinished)
        trained.model.save_pretrained(unfinished, config=notes, model_card_kwargs=card)

    write_folder(folder, fill)


def demo_model(name: str = PACKAGED[0]) -> Path:
    """Return the folder of a packaged model: satellite tiles of 32×32 pixels in 6 classes.

    `name` is one of `PACKAGED`. Raises CheckpointError if the installation lacks it.
    """
    folder = Path(__file__).parent / "pretrained" / name
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: this installation has no {name} model")
    return folder


def local_model(path: Path) -> Path:
    """Return the folder of a packaged model for its name, and other paths as they are."""
    return demo_model(str(path)) if str(path) in PACKAGED and not path.exists() else path


@dataclass(frozen=True)
class StoredWeights:
    """Weights of a file or folder under their canonical names, and the facts stored with them.

    `remarks` say which weights were taken where there were several, and what was removed from them.
    """

    weights: dict[str, Tensor]
    config: DiMRConfig | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def read_weights(path: Path, key: str | None = None, kind: str | None = None) -> StoredWeights:
    """Read weights from any file or folder that holds a model; they are memory-mapped.

    That is a training checkpoint, the folder of a saved model, a `.safetensors` file of weights, a
    published `.pth` file, or the `STEP.ckpt` folder of a published run. `key` chooses among several
    weights: "ema" (the default) or "model" of a training checkpoint, "nnet_ema" (the default) or
    "nnet" of a published run, or a name in a `.pth` file. `kind` is the suffix that decides how a
    file is read, by default its own. Raises CheckpointError where the weights are unusable or `key`
    names none.
    """
    config: DiMRConfig | None = None
    notes: dict[str, Any] = {}
    remarks: list[str] = []
    kind = path.suffix if kind is None else kind
    chosen = None
    if is_published_run(path) and not (path / CONFIG).exists():
        weights, chosen = load_published_run(path, key)
        remarks.append(f"took the weights {chosen} of a published run")
    elif path.is_dir():
        config, notes = read_config(path / CONFIG)
        weights, _ = read_tensors(path / WEIGHTS)
    elif kind == SAFETENSORS:
        weights, metadata = read_tensors(path)
        if "config" in metadata:
            chosen = key or "ema"
            if chosen not in ("ema", "model"):
                raise CheckpointError(f"{path}: got key {key!r}, expected ema or model")
            stored, said = load_checkpoint(path, f"{chosen}.")
            weights = {name.removeprefix(f"{chosen}."): value for name, value in stored.items()}
            config = DiMRConfig.from_dict(said["config"])
            notes = {name: said[name] for name in ("classes", "scale") if name in said}
            # Runs of earlier versions knew no other schedule.
            notes["schedule"] = said.get("schedule", "discrete")
            described = "EMA weights" if chosen == "ema" else "weights without EMA"
            remarks.append(f"took the {described} of a training checkpoint")
    else:
        weights, chosen = load_published(path, key), key
    if key is not None and chosen is None:
        raise CheckpointError(f"{path}: got key {key!r}, but it holds one model; leave the key out")
    weights, removed = canonical(weights)
    if weights.pop(COUNTER, None) is not None:
        remarks.append(f"removed `{COUNTER}`, the counter of an AveragedModel")
    if removed:
        parts = ", ".join(f"`{part}.`" for part in sorted(removed))
        remarks.append(f"removed {parts} from the weights' names")
    return StoredWeights(weights, config, notes, tuple(remarks))
