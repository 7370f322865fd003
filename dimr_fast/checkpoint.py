"""Checkpoints: one safetensors file that appears whole or not at all; published `.pth` files."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dimr_fast.config import DiMRConfig
from dimr_fast.data.scaling import Scale, scale_from_dict
from dimr_fast.files import write_atomically
from dimr_fast.model import DiMR

EMA_PREFIX = "ema."
_CHECKSUMS = "crc32"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another kind; the message names the file."""


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors, and JSON values as metadata, to `path`, replacing it in one step.

    What was there stays until the new file is complete. A checksum of each tensor goes with them.
    Raises OSError where it cannot be written.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksums = {name: _checksum(tensor) for name, tensor in whole.items()}
    values = {**metadata, _CHECKSUMS: checksums}
    text = {name: json.dumps(value) for name, value in values.items()}
    try:
        write_atomically(path, lambda part: save_file(whole, part, metadata=text))
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def load_checkpoint(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the metadata of a file written by `save_checkpoint`.

    Only tensors whose names begin with `prefix` are read; they keep their names.
    Raises CheckpointError where the file is missing, damaged or was written by something else.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint ({error})") from error
    checksums = metadata.pop(_CHECKSUMS, {})
    for name, tensor in tensors.items():
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
    """The model of a checkpoint, on the CPU, with its EMA weights and in evaluation mode.

    Raises CheckpointError where the file is unusable or its weights do not fit its configuration.
    """
    tensors, metadata = load_checkpoint(path, EMA_PREFIX)
    try:
        model = DiMR(DiMRConfig.from_dict(metadata["config"]))
        classes = tuple(metadata["classes"])
        scale = scale_from_dict(metadata["scale"])
        weights = {name.removeprefix(EMA_PREFIX): value for name, value in tensors.items()}
        model.load_state_dict(weights, strict=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of a DiMR model ({error})") from error
    return TrainedModel(model.eval(), classes, scale)


def load_published(path: Path) -> dict[str, Tensor]:
    """The state dict of a published `.pth` file, for `model.load_state_dict(…, strict=True)`.

    Only tensors are unpickled. Raises CheckpointError where the file is missing, damaged or holds
    anything else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
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
