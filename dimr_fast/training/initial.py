"""Start training from given weights, fitted to the classes and the size of the new model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dimr_fast.checkpoint import local_model, published_training, read_weights, schedule_of
from dimr_fast.config import DiMRConfig, preset_of
from dimr_fast.data.scaling import PUBLISHED_PIXELS, LatentScale, PixelScale, scale_from_dict
from dimr_fast.errors import CheckpointError
from dimr_fast.hub.download import local_file
from dimr_fast.model import DiMR

CLASSES = "stages.0.class_embeds.weight"
POSITIONS = "input_layer.3.position_embeddings.weight"


@dataclass(frozen=True)
class InitialModel:
    """A model that starts from given weights.

    `scale` is what its inputs must be scaled with, None for a model of latents; `schedule` is the
    noise schedule that the weights were trained with, None if that is unknown; `remarks` say what
    was fitted and assumed.
    """

    model: DiMR
    scale: PixelScale | None
    schedule: str | None
    remarks: tuple[str, ...]


def initial_model(config: DiMRConfig, source: str, *, latents: bool) -> InitialModel:
    """Return a new model that starts from the weights of `source`; `latents` are its examples.

    `source` is whatever `read_weights` reads, or a file on the Hub; of a training run it takes the
    EMA weights. With another number of classes the embeddings of classes are new, except that of
    the null class; with another size the position embeddings are interpolated. Raises
    CheckpointError where the weights are unusable, do not fit the model otherwise or are of pixels
    where the examples are latents.
    """
    path = local_model(local_file(Path(source).expanduser()))
    stored = read_weights(path)
    model = DiMR(config)
    weights, remarks = _fitted(model.state_dict(), stored.weights, config, stored.config, path)
    try:
        fitted = DiMR.from_weights(config, weights, path)
    except CheckpointError as error:
        known = preset_of(stored.config) if stored.config is not None else None
        hint = f"; it holds {known}: set preset={known}" if known else ""
        raise CheckpointError(f"init: {error}{hint}") from error
    # In memory of their own: the file may change, and its tensors share memory with it.
    model.load_state_dict({name: value.clone() for name, value in fitted.state_dict().items()})
    scale, assumed = _scale(stored.notes, latents, path)
    schedule = schedule_of(stored.notes) or published_training(config).get("schedule")
    first = f"training starts from {source}"
    return InitialModel(model, scale, schedule, (first, *stored.remarks, *remarks, *assumed))


def _scale(
    notes: Mapping[str, Any], latents: bool, path: Path
) -> tuple[PixelScale | None, list[str]]:
    """Return the pixel scale of the stored model, and a remark where it is assumed."""
    try:
        scale = scale_from_dict(notes["scale"]) if "scale" in notes else None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"init: {path}: not the scale of a model ({error})") from error
    if scale is not None and isinstance(scale, LatentScale) != latents:
        of, data = ("pixels", "latents") if latents else ("latents", "pixels")
        raise CheckpointError(f"init: {path}: a model of {of}, but the data are {data}")
    if latents:
        return None, []
    if isinstance(scale, PixelScale):
        return scale, []
    return PUBLISHED_PIXELS, ["assumed that the weights are of pixels scaled to −1..1"]


def _fitted(
    new: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
    config: DiMRConfig,
    old_config: DiMRConfig | None,
    path: Path,
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights with class and position embeddings of the shapes of the new model."""
    weights, remarks = dict(old), []
    classes = weights.get(CLASSES)
    if classes is not None and classes.dim() == 2 and len(classes) != len(new[CLASSES]):
        table = new[CLASSES].to(classes.dtype, copy=True)
        if classes.shape[1] == table.shape[1]:
            table[-1] = classes[-1]
            weights[CLASSES] = table
            remarks.append(
                f"the embeddings of the {len(table) - 1:,} classes are new, since the weights are "
                f"of {len(classes) - 1:,}; that of the null class is kept"
            )
    for i, branch in enumerate(config.stage_configs):
        name = f"stages.{i}.{POSITIONS}"
        positions = weights.get(name)
        to = (branch.max_height, branch.max_width)
        if positions is None or positions.dim() != 2 or len(positions) == math.prod(to):
            continue
        if old_config is not None and i < len(old_config.stage_configs):
            before = old_config.stage_configs[i]
            of = (before.max_height, before.max_width)
        else:
            of = (math.isqrt(len(positions)),) * 2
        if len(positions) != math.prod(of):
            raise CheckpointError(
                f"init: {path}: {name} has {len(positions)} positions, expected a square number"
            )
        weights[name] = _interpolated(positions, of, to)
        remarks.append(f"interpolated the positions of branch {i} from {of} to {to}")
    return weights, remarks


def _interpolated(table: Tensor, of: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Interpolate embeddings [H·W, D] of H × W = `of` positions to `to` positions, bicubically."""
    grid = table.float().unflatten(0, of).permute(2, 0, 1)[None]
    resized = F.interpolate(grid, to, mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).flatten(0, 1).to(table.dtype)
