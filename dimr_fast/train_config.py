"""What to train, on what and how: one typed configuration, read from YAML and `key=value` words."""

import dataclasses
import difflib
import math
import types
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

import yaml

from dimr_fast.config import require, require_fields
from dimr_fast.device import Precision
from dimr_fast.files import write_atomically

FREE = {
    "output",
    "data",
    "minutes",
    "steps",
    "accumulation",
    "checkpointing",
    "checkpoint_minutes",
    "milestone_steps",
    "milestones",
    "log_steps",
    "tensorboard",
    "sample_steps",
    "score_steps",
    "score_images",
    "score_reference",
    "autoencoder",
    "workers",
    "sharding",
    "nonfinite",
    "device",
}
"""The settings that a resumed run may change; the others are its recipe. `data` must hold the same
examples then, wherever it lies."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, how long and how. The defaults are the recipe of the demo."""

    output: Path
    """Folder of the run; must not hold one unless it is resumed."""
    preset: str = "demo"
    """Name of a preset; its class count, channels and size follow the data."""
    data: str = "tiles"
    """"tiles", the satellite tiles of the installed data package; or a folder: of images, with a
    sub-folder for each class, or of latents that `dimr-fast extract` wrote."""
    image_size: int | None = None
    """Side that the images of a folder are cut to; by default the preset's."""
    minutes: float | None = 10.0
    """Stop after this much training time."""
    steps: int | None = None
    """Stop after this many steps; whichever of the two comes first."""
    batch_size: int = 32
    """Images a step, over all processes."""
    accumulation: int = 1
    """Parts that each process computes its share of a batch in, one after the other."""
    checkpointing: tuple[int, ...] = ()
    """Branches, 0 the lowest resolution, whose activations are computed again for backward."""
    learning_rate: float = 4e-3
    warmup_steps: int = 100
    """The learning rate rises linearly over these."""
    decay: float = 0.5
    """The learning rate falls linearly to zero over this last part of the run."""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.03
    """On every parameter but the `nodecay_` ones."""
    max_grad_norm: float | None = 1.0
    ema_decay: float = 0.9999
    ema_warmup: bool = True
    """Start the average with (1 + n)/(10 + n) at step n, so that a short run averages over its last
    tenth."""
    label_dropout: float = 0.1
    """Share of the labels replaced by the null class, for guidance."""
    mirror: bool = True
    """Show half of the images left-right mirrored."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is not finite: stop before the step is taken, or leave the step
    out, and stop at ten in a row. Either way `nonfinite.safetensors` holds what there was."""
    precision: Precision = "auto"
    """Of the matrix products: fp32, bf16 or fp16; "auto" is bf16 where the device is faster so."""
    sharding: Literal["none", "fsdp2"] = "none"
    """What each of many processes keeps: a whole model and optimizer, or its share (FSDP2)."""
    workers: int = 0
    """Processes that read images ahead; 0 reads them in between."""
    checkpoint_minutes: float = 2.0
    """Write a checkpoint this often, and at the end."""
    milestone_steps: int | None = None
    """Keep the checkpoint of each multiple of this beside the newest, as checkpoint-STEP."""
    milestones: int | None = None
    """Keep only so many of them, the newest; by default all."""
    log_steps: int = 50
    """Write a line to `log.jsonl` this often: loss, gradient norm, images/s, MFU."""
    tensorboard: bool = False
    """Write the same to `tensorboard/`, and the sample grids."""
    sample_steps: int | None = None
    """Draw a grid of samples to `samples/` this often."""
    score_steps: int | None = None
    """Log the Fréchet distance of samples to `score_reference` this often."""
    score_images: int = 512
    score_reference: str = "tiles"
    """"tiles", those held out of training, or a folder or .npz of images."""
    autoencoder: str | None = None
    """Folder or name of the autoencoder that decodes the samples of a model of latents."""
    device: str = "auto"
    seed: int = 0

    def validate(self) -> None:
        """ValueError naming a setting that is out of range."""
        choices = {name: getattr(self, name) for name in ("precision", "sharding", "nonfinite")}
        _typed_fields(type(self), choices)
        minutes, clip = self.minutes, self.max_grad_norm
        timed = self.steps is not None if minutes is None else minutes > 0

        def often(name: str) -> tuple[bool, str]:
            return getattr(self, name) is None or getattr(self, name) > 0, "a positive number"

        require_fields(
            self,
            minutes=(timed, "a positive number, or none beside steps"),
            steps=often("steps"),
            image_size=often("image_size"),
            batch_size=(self.batch_size > 0, "a positive number"),
            accumulation=(self.accumulation > 0, "a positive number"),
            checkpointing=(min(self.checkpointing, default=0) >= 0, "numbers of branches"),
            learning_rate=(self.learning_rate > 0, "a positive number"),
            warmup_steps=(self.warmup_steps >= 0, "0 or more"),
            decay=(0 <= self.decay <= 1, "0..1"),
            betas=(all(0 <= beta < 1 for beta in self.betas), "two numbers in 0 <= beta < 1"),
            weight_decay=(self.weight_decay >= 0, "0 or more"),
            max_grad_norm=(clip is None or clip > 0, "a positive number or none"),
            ema_decay=(0 <= self.ema_decay < 1, "0 <= decay < 1"),
            label_dropout=(0 <= self.label_dropout <= 1, "0..1"),
            sharding=(
                self.sharding == "none" or self.precision != "fp16",
                "none with fp16, whose loss scaling does not know shards; or bf16",
            ),
            workers=(self.workers >= 0, "0 or more"),
            checkpoint_minutes=(self.checkpoint_minutes > 0, "a positive number"),
            milestone_steps=often("milestone_steps"),
            milestones=often("milestones"),
            log_steps=often("log_steps"),
            sample_steps=often("sample_steps"),
            score_steps=often("score_steps"),
            score_images=(self.score_images > 1, "2 or more"),
            seed=(self.seed >= 0, "0 or more"),
        )

    @classmethod
    def read(
        cls, source: str | Path | None, changes: Sequence[str] = (), output: Path | None = None
    ) -> Self:
        """The configuration of a YAML file, or of the shipped recipe of that name, with changes.

        `changes` are words like "batch_size=64", whose values are YAML too; `output` replaces that
        of the file. Settings that nothing names keep their defaults. Raises ValueError naming a
        setting that is unknown or of another type, FileNotFoundError without the file.
        """
        values = {} if source is None else _load(source)
        for word in changes:
            key, equals, text = word.partition("=")
            require(bool(equals), "set", word, "KEY=VALUE")
            values[key] = _parse(text, key)
        if output is not None:
            values["output"] = str(output)
        require("output" in values, "output", None, "the folder of the run")
        return cls(**_typed_fields(cls, values))

    def write(self, path: Path) -> None:
        """Write all settings as YAML, for `read`."""
        write_atomically(
            path, lambda part: part.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        values = dataclasses.asdict(self)
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return plain | {"output": str(self.output)}

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings that a resumed run may not change."""
        return {name: value for name, value in self.to_dict().items() if name not in FREE}


def shipped_recipes() -> dict[str, Path]:
    """The YAML files in the package, by the name that `read` takes."""
    folder = Path(str(resources.files("dimr_fast") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _load(source: str | Path) -> dict[str, Any]:
    path = shipped_recipes().get(str(source), Path(source))
    if not path.is_file():
        raise FileNotFoundError(
            f"config: got {str(source)!r}, expected a YAML file or one of "
            f"{', '.join(shipped_recipes())}"
        )
    values = _parse(path.read_text(encoding="utf-8"), str(path))
    require(isinstance(values, dict), str(path), type(values).__name__, "settings as KEY: VALUE")
    return dict(values)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: got no YAML ({' '.join(str(error).split())})") from error


def _typed_fields(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            meant = f"; {near[0]}?" if near else ""
            raise ValueError(f"{key}: got an unknown setting, expected one of TrainConfig's{meant}")
    return {key: _typed(key, value, hints[key]) for key, value in values.items()}


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value`, as YAML gives it, as the type of a field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return _typed(name, value, next(a for a in arguments if a is not type(None)))
    if origin is Literal:
        require(value in arguments, name, value, f"one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        many = arguments[-1] is ...
        fits = isinstance(value, Sequence) and not isinstance(value, str)
        count = "a list" if many else f"a list of {len(arguments)}"
        require(fits and (many or len(value) == len(arguments)), name, value, count)
        return tuple(_typed(name, item, arguments[0]) for item in value)
    if hint is bool:
        require(isinstance(value, bool), name, value, "true or false")
        return value
    if hint in (int, float):
        return _number(name, value, hint)
    require(isinstance(value, str | int | float), name, value, "text")
    return hint(str(value))


def _number(name: str, value: Any, hint: type) -> Any:
    """YAML reads 1e-4 as text, and people write 1e6 for a whole number."""
    expected = "a whole number" if hint is int else "a number"
    require(
        isinstance(value, str | int | float) and not isinstance(value, bool), name, value, expected
    )
    try:
        number = float(value)
    except ValueError as error:
        raise ValueError(f"{name}: got {value!r}, expected {expected}") from error
    if hint is float:
        require(math.isfinite(number), name, value, "a finite number")
        return number
    require(math.isfinite(number) and number == int(number), name, value, expected)
    return value if isinstance(value, int) else int(number)
