"""Convert published `.pth` files to safetensors and back, and verify the result.

`dimr-fast convert`.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from dimr_fast.checkpoint import (
    SAFETENSORS,
    StoredWeights,
    published_training,
    read_weights,
    schedule_of,
)
from dimr_fast.config import PRESETS, DiMRConfig, preset_of
from dimr_fast.data.imagenet import default_classes
from dimr_fast.data.scaling import PixelScale, scale_to_dict
from dimr_fast.diffusion import ScheduleName
from dimr_fast.errors import CheckpointError
from dimr_fast.hub.download import HUB_FILE, local_file
from dimr_fast.hub.mixin import CONFIG, read_config
from dimr_fast.hub.published import read_published_config
from dimr_fast.model import DiMR
from dimr_fast.utils.files import lock_folder, user_cache, write_atomically, write_folder
from dimr_fast.utils.tensors import write_tensors
from dimr_fast.utils.validation import require, require_fields

PUBLISHED = (".pth", ".pt")
CONVERSION_TIMEOUT = 600.0
"""Seconds to wait for another process that converts the same file."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Settings of a conversion."""

    input: Path
    """A published .pth or the N.ckpt folder of a published run; a .safetensors file of bare weights
    or of a training run; or a folder that was exported or saved. A file on the Hugging Face Hub is
    OWNER/REPOSITORY:FILE."""
    output: Path
    """NAME.pth for the published code, NAME.safetensors with the same parameter names, or a folder.
    It must not exist yet."""
    preset: str | None = None
    """Name of the model's preset; by default the preset that fits the weights."""
    config: Path | None = None
    """For a model that is no preset: a file like a folder's config.json, whose classes, scale and
    schedule are kept, or a published configs/NAME.py, which is read without executing it."""
    key: str | None = None
    """Which weights to take where the input holds several: ema (the default) or model of a training
    run, nnet_ema (the default) or nnet of an N.ckpt folder, or a name in a .pth file."""
    schedule: ScheduleName | None = None
    """Noise schedule that the model was trained with, for a folder as output. discrete: that of
    published models of latents; vp-sde: that of published models of pixels. Needed for a pixel
    model that is neither a published preset nor a training run of this package."""
    pixel_scale: tuple[float, float] | None = None
    """Mean and standard deviation that pixels 0..255 were scaled with, for a folder as output:
    127.5 127.5 means −1..1."""

    def validate(self) -> None:
        """Raise ValueError naming a setting that is out of range."""
        kind, scale = self.output.suffix, self.pixel_scale
        folder = kind not in (*PUBLISHED, SAFETENSORS)
        require_fields(
            self,
            schedule=(
                self.schedule is None or (folder and self.schedule in get_args(ScheduleName)),
                f"{' or '.join(get_args(ScheduleName))}, for a folder as output",
            ),
            pixel_scale=(
                scale is None or (folder and scale[1] > 0),
                "mean and standard deviation, a positive number, for a folder as output",
            ),
            preset=(self.preset is None or self.preset in PRESETS, f"one of {', '.join(PRESETS)}"),
            config=(self.config is None or self.preset is None, "None beside preset"),
        )


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion; `remarks` state what was assumed or removed."""

    output: Path
    parameters: int
    preset: str | None
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        known = f", {self.preset}" if self.preset else ""
        written = f"wrote {self.output}: {self.parameters:,} parameters{known}"
        return "\n".join([f"{written}; loaded again, it gives the same outputs", *self.remarks])


def convert(config: ConvertConfig) -> Conversion:
    """Write the weights of `config.input` to `config.output`.

    Before the output gets its name it is loaded again, and its weights and model outputs must
    equal those of the input exactly. Raises, before any work, ValueError for an unusable
    setting, FileExistsError where there is an output already and CheckpointError for an input that
    is unusable or, in a `.pth`, holds anything but tensors; CheckpointError where what was written
    differs; and OSError where nothing can be written.
    """
    config.validate()
    output, kind = config.output, config.output.suffix
    if output.exists():
        raise FileExistsError(f"{output} exists already; choose another output")
    source = read_weights(local_file(config.input), config.key)
    model, notes = _model(source, config)
    expected = _outputs(model)
    if not all(prediction.isfinite().all() for prediction in expected):
        raise CheckpointError(f"{config.input}: its model's predictions are not finite")
    remarks = source.remarks

    def verify(unfinished: Path) -> None:
        written = read_weights(unfinished, kind=kind)
        again = DiMR.from_weights(model.config, written.weights, output)
        weights = (source.weights[name] for name in written.weights)
        if not (_equal(written.weights.values(), weights) and _equal(_outputs(again), expected)):
            raise CheckpointError(f"{output}: loaded again, it differs from {config.input}")

    def write_file(unfinished: Path) -> None:
        if kind == SAFETENSORS:
            write_tensors(unfinished, source.weights, {"format": "pt"})
        else:
            # torch.save would write the whole storage of a tensor that is a view.
            torch.save({name: value.clone() for name, value in source.weights.items()}, unfinished)
        verify(unfinished)

    def write_model(unfinished: Path) -> None:
        card = {"name": output.absolute().name}
        model.save_pretrained(unfinished, config=notes, model_card_kwargs=card)
        verify(unfinished)

    if kind in (*PUBLISHED, SAFETENSORS):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, write_file)
    else:
        notes, assumed = _with_training(model.config, notes, config)
        remarks += tuple(f"{remark}; if not so, correct {output / CONFIG}" for remark in assumed)
        if "schedule" not in notes or "scale" not in notes:
            remarks += (
                "how it was trained is not known, so no images can be drawn with it; to state it, "
                "convert again with --schedule and --pixel-scale",
            )
        write_folder(output, write_model)
    count = sum(parameter.numel() for parameter in model.parameters())
    return Conversion(output, count, preset_of(model.config), remarks)


def model_of_hub_file(name: Path) -> Path:
    """Download and convert OWNER/REPOSITORY:FILE; return the folder of the converted model.

    It is in the user's cache, where later calls find it. Raises CheckpointError where the Hub does
    not give the file, or it is no model; OSError where the cache cannot be written.
    """
    found = HUB_FILE.fullmatch(str(name))
    require(found is not None, "checkpoint", str(name), "OWNER/REPOSITORY:FILE")
    source = local_file(name)
    folder = user_cache() / "models" / metadata.version("dimr_fast")
    folder /= re.sub(r"[/:]", "--", str(name))
    folder.mkdir(parents=True, exist_ok=True)
    # The path in the Hub's cache states the revision.
    output = folder / hashlib.sha256(str(source).encode()).hexdigest()[:16]
    with lock_folder(folder, CONVERSION_TIMEOUT):
        if not output.exists():
            convert(ConvertConfig(input=source, output=output))
    return output


def _model(source: StoredWeights, config: ConvertConfig) -> tuple[DiMR, dict[str, Any]]:
    """The model of the source's weights, and the notes on it; CheckpointError if nothing fits."""
    if config.config is not None:
        if config.config.suffix == ".py":
            given, notes = read_published_config(config.config), source.notes
        else:
            given, notes = read_config(config.config)
        return DiMR.from_weights(given, source.weights, config.input), notes
    if source.config is not None and config.preset is None:
        return DiMR.from_weights(source.config, source.weights, config.input), source.notes
    if config.preset is not None:
        sized = _sized(config.preset, source.weights)
        return DiMR.from_weights(sized, source.weights, config.input), source.notes
    return model_of_preset(source.weights, config.input), source.notes


def model_of_preset(weights: dict[str, Tensor], path: Path) -> DiMR:
    """Return the model of the preset that these weights fit, with their number of classes.

    Raises CheckpointError naming `path` where they fit none.
    """
    nearest = ""
    for name in _candidates(weights):
        try:
            return DiMR.from_weights(_sized(name, weights), weights, path)
        except CheckpointError as error:
            nearest = f" (with {name}, {str(error).removeprefix(f'{path}: ')})"
    raise CheckpointError(
        f"{path}: its weights fit none of {', '.join(PRESETS)}{nearest}; describe the model by "
        "--config"
    )


def _candidates(weights: dict[str, Tensor]) -> list[str]:
    """Return the presets whose first weight has this shape; comparing all weights takes seconds."""
    first = weights.get("stages.0.input_layer.1.weight")
    if first is None:
        return []
    low = {name: config.stage_configs[0] for name, config in PRESETS.items()}
    shapes = {
        name: (branch.dim, PRESETS[name].channels, *2 * (branch.input_feature_ratio,))
        for name, branch in low.items()
    }
    return [name for name, shape in shapes.items() if shape == tuple(first.shape)]


def _sized(name: str, weights: dict[str, Tensor]) -> DiMRConfig:
    """Return the preset with the number of classes of the weights."""
    table = weights.get("stages.0.class_embeds.weight")
    classes = PRESETS[name].num_classes if table is None else max(1, len(table))
    return dataclasses.replace(PRESETS[name], num_classes=classes)


def _with_training(
    model: DiMRConfig, notes: dict[str, Any], config: ConvertConfig
) -> tuple[dict[str, Any], list[str]]:
    """Return the notes with how the model was trained, and remarks about what was assumed."""
    found, assumed = dict(notes), []
    if config.schedule is not None:
        found["schedule"] = config.schedule
    if config.pixel_scale is not None:
        found["scale"] = scale_to_dict(PixelScale(*config.pixel_scale))
    if "classes" not in found:
        found["classes"] = list(default_classes(model.null_class))
        names = ", ".join(found["classes"][:3])
        assumed.append(f"assumed class names {names}, …")
    if (known := schedule_of(found)) is not None:
        found["schedule"] = known
    published = published_training(model)
    if published and "scale" not in found:
        found["scale"] = published["scale"]
        latents = found["scale"]["kind"] == "latents"
        assumed.append(f"assumed inputs of {'latents × 0.18215' if latents else 'pixels, −1..1'}")
    if published and known is None:
        found = published | found
        assumed.append(f"assumed the noise schedule {found['schedule']} and published sampling")
    return found, assumed


def _outputs(model: DiMR) -> list[Tensor]:
    """Return predictions for a fixed input: two images, two times, one class and the null class."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    shape = (2, config.channels, *config.image_size)
    x = torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    y = torch.tensor([0, config.null_class])
    with torch.inference_mode():
        return model(x, log_snr=torch.tensor([-3.0, 2.0]), y=y)


def _equal(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(a, b, strict=True))
