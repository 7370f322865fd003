"""State of a training run: model, EMA, optimizer and position, in memory and on disk."""

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

from dimr_fast.checkpoint import EMA_PREFIX, INTERVALS, load_checkpoint, save_checkpoint
from dimr_fast.data.scaling import Scale, scale_from_dict, scale_to_dict
from dimr_fast.diffusion import ScheduleName
from dimr_fast.errors import CheckpointError
from dimr_fast.model import DiMR
from dimr_fast.optim import EMA, state_names
from dimr_fast.training.averages import AVERAGE_PREFIX, prefix_of
from dimr_fast.training.config import TrainConfig
from dimr_fast.utils.files import write_atomically

CHECKPOINT = "checkpoint.safetensors"
MODEL_PREFIX, OPTIMIZER_PREFIX = "model.", "optimizer."


@dataclass
class TrainState:
    """Hold a run between two steps. Tensors may be FSDP2 shards in memory; on disk they are whole.

    `step` counts the batches seen, `seconds` the time they took; `losses` has one entry per step.
    `evaluations` is None unless the model is distilled (see `TrainedModel`). `averages` are the
    power-function averages that the run keeps, by their length.
    """

    model: DiMR
    optimizer: torch.optim.Optimizer
    ema: EMA
    scaler: torch.amp.GradScaler
    classes: tuple[str, ...]
    scale: Scale
    schedule: ScheduleName
    recipe: dict[str, Any]
    evaluations: int | None = None
    averages: Mapping[float, EMA] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    @property
    def _config(self) -> dict[str, Any]:
        """The model's configuration without activation checkpointing, which only training uses."""
        branches = (replace(b, checkpointing=False) for b in self.model.config.stage_configs)
        return replace(self.model.config, stage_configs=tuple(branches)).to_dict()

    def tensors(self, prefix: str = "", *, keep: bool = True) -> dict[str, Tensor]:
        """Return the whole tensors whose names on disk begin with `prefix`.

        Every process must call this, because shards are gathered, one tensor at a time: all of
        them may exceed one device's memory. With `keep=False` the result is empty.
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
            for length, average in self.averages.items():
                yield prefix_of(length) + name, average.tensors[name]
            for key, value in self.optimizer.state[parameter].items():
                yield f"{OPTIMIZER_PREFIX}{key}.{name}", value
        yield "losses", torch.tensor(self.losses, dtype=torch.float64)

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of a checkpoint, as JSON values."""
        return {
            "config": self._config,
            "classes": self.classes,
            "scale": scale_to_dict(self.scale),
            "schedule": self.schedule,
            "recipe": self.recipe,
            "evaluations": self.evaluations,
            "intervals": None if self.evaluations is None else INTERVALS,
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }

    def save(self, path: Path, *, write: bool = True) -> None:
        """Write a checkpoint atomically; every process calls this, the one with `write` writes.

        Raises OSError where it cannot be written; then the previous checkpoint stays.
        """
        tensors = self.tensors(keep=write)
        if write:
            save_checkpoint(path, tensors, self.metadata())

    def save_averages(self, folder: Path, *, write: bool = True) -> None:
        """Write the power-function averages of this step to a file in `folder`; see `save`."""
        tensors = self.tensors(AVERAGE_PREFIX, keep=write)
        if write:
            folder.mkdir(exist_ok=True)
            path = folder / f"{self.step:08d}.safetensors"
            metadata = self.metadata()
            kept = {name: metadata[name] for name in ("config", "recipe", "step")}
            save_checkpoint(path, tensors, kept)

    def load(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Restore the state from what `read_state(path)` returned.

        The scale of inputs is restored too: measured again it might round differently. Raises
        CheckpointError where model, recipe or classes differ from this run's.
        """
        if metadata.get("config") != json.loads(json.dumps(self._config)):
            raise CheckpointError(f"{path}: its model configuration differs from that of this run")
        classes = tuple(metadata.get("classes") or ())
        if classes != self.classes:
            raise CheckpointError(
                f"{path}: was trained with classes {_abbreviate(classes)}, "
                f"not {_abbreviate(self.classes)}"
            )
        # What a run of an earlier version did not record had the value that is the default now.
        defaults = TrainConfig(output=path.parent).recipe
        earlier = {name: value for name, value in defaults.items() if name in self.recipe}
        for name, value in (earlier | (metadata.get("recipe") or {})).items():
            if self.recipe.get(name) != value:
                ours = self.recipe.get(name)
                raise CheckpointError(f"{path}: was trained with {name} {value}, not {ours}")
        try:
            self.scale = scale_from_dict(metadata["scale"])
            self.step, self.seconds = metadata["step"], metadata["seconds"]
            self.losses = tensors["losses"].tolist()
            self.scaler.load_state_dict(metadata["scaler"])
            # An optimizer has no state before its first step.
            stepped = any(name.startswith(OPTIMIZER_PREFIX) for name in tensors)
            keys = state_names(self.optimizer)
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    _copy_into(parameter, tensors[MODEL_PREFIX + name])
                    _copy_into(self.ema.tensors[name], tensors[EMA_PREFIX + name])
                    for length, average in self.averages.items():
                        _copy_into(average.tensors[name], tensors[prefix_of(length) + name])
                    self.optimizer.state[parameter] = {
                        key: _as_stored_in(tensors[f"{OPTIMIZER_PREFIX}{key}.{name}"], parameter)
                        for key in (keys[parameter] if stepped else ())
                    }
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: not a checkpoint of this run ({error})") from error


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify the tensors and metadata of a run's checkpoint.

    Raises CheckpointError where it is missing or damaged; the message names the newest milestone
    beside it, from which the run can be resumed.
    """
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        # The newest milestone may be a hard link to this very file.
        others = [o for _, o in milestones(path) if not (path.exists() and o.samefile(path))]
        if not others:
            raise
        hint = f"to resume from the newest milestone, copy {others[-1].name} to {path.name}"
        raise CheckpointError(f"{error}; {hint}") from error


def milestones(path: Path) -> list[tuple[int, Path]]:
    """Return steps and paths of the milestones beside the checkpoint `path`, oldest first."""
    found = []
    for other in path.parent.glob(f"{path.stem}-*{path.suffix}"):
        step = other.stem.removeprefix(f"{path.stem}-")
        if step.isdecimal():
            found.append((int(step), other))
    return sorted(found)


def keep_milestone(path: Path, step: int, newest: int | None) -> None:
    """Keep the checkpoint at `path` as a milestone; remove all but the `newest` milestones.

    A hard link: it takes no disk space until the next checkpoint replaces `path`.
    """
    kept = path.with_name(f"{path.stem}-{step:08d}{path.suffix}")
    kept.unlink(missing_ok=True)
    try:
        os.link(path, kept)
    except OSError:  # a file system without hard links
        write_atomically(kept, lambda part: shutil.copyfile(path, part))
    if newest is not None:
        # Later milestones stay: they are from before this run was reset to an earlier one.
        for _, other in [m for m in milestones(path) if m[0] <= step][:-newest]:
            other.unlink()


def _abbreviate(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")


def _copy_into(target: Tensor, value: Tensor) -> None:
    if target.shape != value.shape:
        raise ValueError(f"got shape {tuple(value.shape)}, expected {tuple(target.shape)}")
    target.copy_(_as_stored_in(value, target))


def _as_stored_in(value: Tensor, parameter: Tensor) -> Tensor:
    """Return `value` on the parameter's device, sharded like it; step counts stay whole."""
    value = value.to(parameter.device, copy=True)  # not a memory-mapped view
    if isinstance(parameter, DTensor) and value.dim() > 0:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
