"""Checkpoints: of training, of saved models, and the published `.pth` files."""

import json
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dimr_fast.config import DiMRConfig
from dimr_fast.data.scaling import Scale, scale_from_dict, scale_to_dict
from dimr_fast.files import write_folder, write_tensors
from dimr_fast.hub import CONFIG, CheckpointError, read_config, read_tensors
from dimr_fast.model import DiMR

EMA_PREFIX = "ema."
_CHECKSUMS = "crc32"


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors, and JSON values as metadata, to `path`, replacing it in one step.

    What was there stays until the new file is complete. A checksum of each tensor goes with them.
    Raises OSError where it cannot be written.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksums = {name: _checksum(tensor) for name, tensor in whole.items()}
    values = {**metadata, _CHECKSUMS: checksums}
    write_tensors(path, whole, {name: json.dumps(value) for name, value in values.items()})


def load_checkpoint(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the metadata of a file written by `save_checkpoint`.

    Only tensors whose names begin with `prefix` are read; they keep their names.
    Raises CheckpointError where the file is missing, damaged or was written by something else.
    """
    tensors, text = read_tensors(path, prefix)
    try:
        metadata = {name: json.loads(value) for name, value in text.items()}
    except ValueError as error:
        raise CheckpointError(f"{path}: not a readable checkpoint ({error})") from error
    # Files of earlier versions have none.
    checksums = metadata.pop(_CHECKSUMS, None)
    for name, tensor in tensors.items() if checksums is not None else ():
        if checksums.get(name) != _checksum(tensor):
            raise CheckpointError(f"{path}: {name} is damaged, its checksum is another")
    return tensors, metadata


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


@dataclass(frozen=True)
class TrainedModel:
    """A model to sample from, and what its training data says of its inputs."""

    model: DiMR
    classes: tuple[str, ...]
    scale: Scale


def load_model(path: Path) -> TrainedModel:
    """The model of a training checkpoint or of a folder, on the CPU and in evaluation mode.

    A checkpoint of training gives its EMA weights. A folder is one that `save_model` or
    `dimr-fast export` wrote. Raises CheckpointError where the files are unusable, do not fit
    together or do not say what the model's classes and inputs are.
    """
    if path.is_dir():
        model, (_, said) = DiMR.from_pretrained(path), read_config(path / CONFIG)
        return TrainedModel(model, *_data(path, said, model.config))
    tensors, said = load_checkpoint(path, EMA_PREFIX)
    try:
        config = DiMRConfig.from_dict(said["config"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of a DiMR model ({error})") from error
    classes, scale = _data(path, said, config)
    weights = {name.removeprefix(EMA_PREFIX): value.clone() for name, value in tensors.items()}
    return TrainedModel(DiMR.from_weights(config, weights, path), classes, scale)


def _data(path: Path, said: dict[str, Any], config: DiMRConfig) -> tuple[tuple[str, ...], Scale]:
    """Classes and scale of what was said of a model."""
    try:
        classes, scale = said["classes"], scale_from_dict(said["scale"])
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


def save_model(
    trained: TrainedModel,
    folder: Path,
    *,
    recipe: dict[str, Any] | None = None,
    scores: dict[str, Any] | None = None,
    license: str | None = None,
    pictures: Sequence[Path] = (),
) -> None:
    """Write a new folder from which `load_model` and `DiMR.from_pretrained` read the model.

    It holds `config.json`, `model.safetensors` and a model card, `README.md`, which carries
    `recipe` and `scores` (JSON values) whole and shows copies of `pictures`. The folder appears
    complete or not at all. `license` is that of the weights, as the Hub names it. Raises
    FileExistsError where there is something already, and OSError where it cannot be written.
    """
    known = {
        "classes": list(trained.classes),
        "scale": scale_to_dict(trained.scale),
        "recipe": recipe,
        "scores": scores,
        "license": license,
    }
    notes = {name: value for name, value in known.items() if value is not None}
    card = {"name": folder.absolute().name, "pictures": [path.name for path in pictures]}

    def fill(unfinished: Path) -> None:
        for path in pictures:
            shutil.copy(path, unfinished)
        trained.model.save_pretrained(unfinished, config=notes, model_card_kwargs=card)

    write_folder(folder, fill)


def demo_model() -> Path:
    """The folder of the model that comes with the package: satellite tiles of 32×32 in 6 classes.

    Raises CheckpointError where the installation lacks it.
    """
    folder = Path(__file__).parent / "pretrained" / "demo"
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: this installation has no demo model")
    return folder


def load_published(path: Path) -> dict[str, Tensor]:
    """The state dict of a published `.pth` file, for `model.load_state_dict(…, strict=True)`.

    Only tensors are unpickled, and read from the file as they are used where its format allows it.
    Raises CheckpointError where the file is missing, damaged or holds anything else.
    """
    try:
        mapped = path.is_file() and zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # what is no checkpoint can fail to unpickle in any way
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: not a readable .pth file ({reason})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds {type(state).__name__}, expected a state dict")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: holds {type(value).__name__} at {name!r}, expected a tensor there"
            )
    return state
