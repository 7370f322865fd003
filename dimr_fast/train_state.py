"""Everything of a training run that goes on: model, average, optimizer, position; on disk too."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from dimr_fast.checkpoint import EMA_PREFIX, CheckpointError, load_checkpoint, save_checkpoint
from dimr_fast.data.scaling import Scale, scale_from_dict, scale_to_dict
from dimr_fast.files import write_atomically
from dimr_fast.model import DiMR
from dimr_fast.optim import EMA

CHECKPOINT = "checkpoint.safetensors"
MODEL_PREFIX, OPTIMIZER_PREFIX = "model.", "optimizer."
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class TrainState:
    """A run between two steps. Its tensors may be shards (FSDP2); on disk they are whole.

    `step` counts the batches seen, `seconds` the time they took; `losses` has one entry a step.
    """

    model: DiMR
    optimizer: torch.optim.AdamW
    ema: EMA
    scaler: torch.amp.GradScaler
    classes: tuple[str, ...]
    scale: Scale
    recipe: dict[str, Any]
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    @property
    def _config(self) -> dict[str, Any]:
        """The model's configuration, without what only its training needs."""
        branches = (replace(b, checkpointing=False) for b in self.model.config.stage_configs)
        return replace(self.model.config, stage_configs=tuple(branches)).to_dict()

    def tensors(self, prefix: str = "", *, keep: bool = True) -> dict[str, Tensor]:
        """The tensors whose names, those on disk, begin with `prefix`; whole.

        Every process must ask, since shards are gathered. One that does not `keep` them gets none:
        what is sharded may be too much for one device, so it is gathered one by one.
        """
        found: dict[str, Tensor] = {}
        for name, tensor in self._named():
            if name.startswith(prefix):
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if keep:
                    found[name] = whole if whole is tensor else whole.cpu()
        return found

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield MODEL_PREFIX + name, parameter.detach()
            yield EMA_PREFIX + name, self.ema.tensors[name]
            for key, value in self.optimizer.state[parameter].items():
                yield f"{OPTIMIZER_PREFIX}{key}.{name}", value
        yield "losses", torch.tensor(self.losses, dtype=torch.float64)

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint says beside its tensors."""
        return {
            "config": self._config,
            "classes": self.classes,
            "scale": scale_to_dict(self.scale),
            "recipe": self.recipe,
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }

    def save(self, path: Path, *, write: bool = True) -> None:
        """Write a checkpoint; every process calls this, and the one with `write` writes.

        What was there stays until the new one is whole. Raises OSError where it cannot be written.
        """
        tensors = self.tensors(keep=write)
        if write:
            save_checkpoint(path, tensors, self.metadata())

    def load(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Take over what `read_state` found at `path`.

        That includes the scale of inputs: measured again it might round differently. Raises
        CheckpointError for another model, recipe or other classes.
        """
        if metadata.get("config") != json.loads(json.dumps(self._config)):
            raise CheckpointError(f"{path}: holds another model than this run trains")
        classes = tuple(metadata.get("classes", ()))
        if classes != self.classes:
            raise CheckpointError(
                f"{path}: was trained with classes {_some(classes)}, not {_some(self.classes)}"
            )
        for name, value in metadata.get("recipe", {}).items():
            if self.recipe.get(name) != value:
                ours = self.recipe.get(name)
                raise CheckpointError(f"{path}: was trained with {name} {value}, not {ours}")
        try:
            self.scale = scale_from_dict(metadata["scale"])
            self.step, self.seconds = metadata["step"], metadata["seconds"]
            self.losses = tensors["losses"].tolist()
            self.scaler.load_state_dict(metadata["scaler"])
            # AdamW has no state before its first step.
            taken = any(name.startswith(OPTIMIZER_PREFIX) for name in tensors)
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    _fill(parameter, tensors[MODEL_PREFIX + name])
                    _fill(self.ema.tensors[name], tensors[EMA_PREFIX + name])
                    self.optimizer.state[parameter] = {
                        key: _like(tensors[f"{OPTIMIZER_PREFIX}{key}.{name}"], parameter)
                        for key in (_MOMENTS if taken else ())
                    }
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: not a checkpoint of this run ({error})") from error


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The contents of a run's checkpoint, verified.

    Raises CheckpointError where it is missing or damaged; the message names the milestones beside
    it, from which the run could go on.
    """
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        # The newest may be a second name for this very file.
        others = [o for _, o in milestones(path) if not (path.exists() and o.samefile(path))]
        if not others:
            raise
        hint = f"to go on from {others[-1].name}, remove {path.name} and copy it there"
        raise CheckpointError(f"{error}; {hint}") from error


def milestones(path: Path) -> list[tuple[int, Path]]:
    """Steps and paths of the milestones of the checkpoint `path`, oldest first."""
    found = []
    for other in path.parent.glob(f"{path.stem}-*{path.suffix}"):
        step = other.stem.removeprefix(f"{path.stem}-")
        if step.isdecimal():
            found.append((int(step), other))
    return sorted(found)


def keep_milestone(path: Path, step: int, newest: int | None) -> None:
    """Keep the checkpoint at `path` under its step's name too, and only the `newest` so far.

    A second name for the same file: it takes no space until the checkpoint is written anew.
    """
    kept = path.with_name(f"{path.stem}-{step:08d}{path.suffix}")
    kept.unlink(missing_ok=True)
    try:
        os.link(path, kept)
    except OSError:  # a file system without links
        write_atomically(kept, lambda part: shutil.copyfile(path, part))
    if newest is not None:
        # Later ones are of a run that was taken back to an earlier milestone.
        for _, other in [m for m in milestones(path) if m[0] <= step][:-newest]:
            other.unlink()


def _some(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")


def _fill(target: Tensor, value: Tensor) -> None:
    if target.shape != value.shape:
        raise ValueError(f"got shape {tuple(value.shape)}, expected {tuple(target.shape)}")
    target.copy_(_like(value, target))


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor on the parameter's device, in shards if that is; step counts stay whole."""
    value = value.to(parameter.device, copy=True)  # no part of a mapped file
    if isinstance(parameter, DTensor) and value.dim() > 0:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
