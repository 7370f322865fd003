"""Settings of a training run: one typed dataclass, read from YAML files and KEY=VALUE words."""

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml

from dimr_fast.diffusion import ScheduleName
from dimr_fast.utils.device import Precision
from dimr_fast.utils.files import write_atomically
from dimr_fast.utils.validation import (
    check_seed,
    load_settings,
    require,
    require_fields,
    text_settings,
)

RESUME_OVERRIDES = {
    "output",
    "data",
    "teacher",
    "teacher_guide",
    "minutes",
    "steps",
    "accumulation",
    "checkpointing",
    "selective_checkpointing",
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
"""Settings that may change when a run is resumed; the others are its recipe. `data`,
`teacher` and `teacher_guide` may be other paths to the same examples and weights."""

Nonfinite = Literal["stop", "skip"]
Optimizer = Literal["adamw", "muon"]
Sharding = Literal["none", "fsdp2"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run. The defaults are the demo's recipe, but with AdamW."""

    output: Path
    """Output folder of the run. It must not contain a run, except with `--resume`."""
    preset: str = "demo"
    """Name of a preset; its number of classes, channels and size are adapted to the data."""
    init: str | None = None
    """Start from these weights instead of random ones: a converted or saved model, a training
    checkpoint (its EMA weights), a published .pth file or N.ckpt folder, or OWNER/REPOSITORY:FILE
    on the Hugging Face Hub. The EMA starts from them too. Embeddings of other classes are new, and
    positions of another size are interpolated."""
    teacher: Path | None = None
    """Distil this trained model, a checkpoint or a folder, instead of learning from noise: see
    `dimr-fast distill`, which also starts from its weights."""
    evaluations: int = 2
    """Network evaluations per image of the distilled model."""
    teacher_guide: Path | None = None
    """Guide the teacher by this worse model, such as an earlier average of its run (autoguidance),
    instead of by its prediction without a class (classifier-free guidance)."""
    teacher_guidance: float = 0.0
    """Strength of the teacher's guidance; the distilled model is sampled without."""
    teacher_steps: int = 8
    """Steps of the teacher that the distilled model learns to replace: multistep DPM-Solver++ of
    order 2, uniform in the log signal-to-noise ratio. A multiple of evaluations."""
    data: str = "tiles"
    """"tiles", the satellite tiles of the installed data package; or a folder of images with one
    sub-folder for each class; or a folder of latents that `dimr-fast extract` wrote."""
    image_size: int | None = None
    """Images of a folder are cropped to squares of this many pixels; by default the preset's."""
    minutes: float | None = 10.0
    """Stop after this much training time."""
    steps: int | None = None
    """Stop after this many steps. The run stops at the first of the two limits."""
    batch_size: int = 32
    """Images in one step, over all processes."""
    accumulation: int = 1
    """Gradient accumulation: micro-batches into which each process splits its share of a batch."""
    checkpointing: tuple[int, ...] = ()
    """Branches (0: lowest resolution) that recompute activations in the backward pass."""
    selective_checkpointing: tuple[int, ...] = ()
    """Branches that recompute only activations that need no matrix product."""
    optimizer: Optimizer = "adamw"
    """adamw: as published. muon: Muon for the matrices of blocks and cascade, AdamW for the other
    parameters; the same learning rate and weight decay serve both."""
    learning_rate: float = 4e-3
    warmup_steps: int = 100
    """The learning rate rises linearly over these steps, from 0 in the first one, as published."""
    decay: float = 0.5
    """The learning rate falls linearly to zero over this last fraction of the run."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of AdamW's averages. Muon's momentum is 0.95."""
    weight_decay: float = 0.03
    """Applied to every parameter except the `nodecay_` ones."""
    max_grad_norm: float | None = 1.0
    ema_decay: float = 0.9999
    ema_warmup: bool = True
    """Limit the EMA decay to (1 + n)/(10 + n) at step n, so that a short run averages over its last
    tenth."""
    average_steps: int | None = None
    """Also keep power-function averages of the weights, and store them in `averages/` this often:
    `dimr-fast export --average-length` makes an average of any length of them."""
    label_dropout: float = 0.1
    """Fraction of labels replaced by the null class, for classifier-free guidance."""
    schedule: ScheduleName = "discrete"
    """Noise schedule and condition. discrete: those of published latent models, whose `log_snr` is
    8·t − 4. vp-sde: those of published pixel models, whose `log_snr` is one."""
    half_log_snr: tuple[float, float] | None = None
    """Mean and standard deviation of the normal distribution from which the log signal-to-noise
    ratio log(α/σ) is drawn: [0.5, 1.2] trains at the noise levels of EDM, [0, 1] at those of
    rectified flow. None: uniform times, as published."""
    min_snr: float | None = None
    """Multiply the loss of an image by min(1, min_snr/SNR): less weight for images with little
    noise; 5 is usual. None: the same weight for all, as published."""
    pixel_scale: tuple[float, float] | None = None
    """Mean and standard deviation that pixels 0..255 are scaled with: [127.5, 127.5] gives −1..1,
    as published. None measures them on the images."""
    mirror: bool = True
    """Mirror each image left-right with probability 0.5."""
    nonfinite: Nonfinite = "stop"
    """Reaction to a loss or gradient that is not finite. stop: end the run before the step.
    skip: skip the step; end the run after ten such steps in a row. Batch and state are written
    to `nonfinite.safetensors`."""
    precision: Precision = "auto"
    """Precision of matrix products; "auto" is bf16 where that is faster on the device."""
    sharding: Sharding = "none"
    """none: every process holds the whole model and optimizer (DDP). fsdp2: each holds a shard."""
    workers: int = 0
    """Data loader workers that read ahead; 0 reads in the training process."""
    checkpoint_minutes: float = 2.0
    """Write a checkpoint this often, and at the end."""
    milestone_steps: int | None = None
    """Interval in steps at which the checkpoint is also kept as checkpoint-STEP."""
    milestones: int | None = None
    """Maximum number of these checkpoints; older ones are deleted. None keeps all."""
    log_steps: int = 50
    """Write a line to `log.jsonl` this often: loss, gradient norm, images/s, MFU."""
    tensorboard: bool = False
    """Also write the log and the sample grids to `tensorboard/`."""
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
        """Raise ValueError naming a setting that is out of range."""
        choices = {
            "optimizer": Optimizer,
            "precision": Precision,
            "sharding": Sharding,
            "nonfinite": Nonfinite,
            "schedule": ScheduleName,
        }
        for name, choice in choices.items():
            allowed = get_args(choice)
            value = getattr(self, name)
            require(value in allowed, name, value, f"one of {', '.join(allowed)}")
        minutes, clip = self.minutes, self.max_grad_norm
        timed = self.steps is not None if minutes is None else minutes > 0
        drawn, learns_noise = self.half_log_snr, self.teacher is None
        no_guide = self.teacher_guide is None

        def often(name: str) -> tuple[bool, str]:
            return getattr(self, name) is None or getattr(self, name) > 0, "a positive number"

        require_fields(
            self,
            minutes=(timed, "a positive number, or none if steps is set"),
            steps=often("steps"),
            image_size=often("image_size"),
            batch_size=(self.batch_size > 0, "a positive number"),
            accumulation=(self.accumulation > 0, "a positive number"),
            checkpointing=(
                min(self.checkpointing, default=0) >= 0,
                "branch indices, 0 or more (0: lowest resolution)",
            ),
            selective_checkpointing=(
                min(self.selective_checkpointing, default=0) >= 0
                and not set(self.selective_checkpointing) & set(self.checkpointing),
                "branch indices, 0 or more, none of them in checkpointing",
            ),
            evaluations=(self.evaluations > 0, "1 or more"),
            teacher_guide=(no_guide or not learns_noise, "none without a teacher"),
            teacher_guidance=(
                -1 <= self.teacher_guidance < math.inf and (no_guide or self.teacher_guidance != 0),
                "a number, -1 or more, and not 0 with teacher_guide",
            ),
            teacher_steps=(
                self.teacher_steps > 0 and self.teacher_steps % max(self.evaluations, 1) == 0,
                f"a positive multiple of evaluations, {self.evaluations}",
            ),
            learning_rate=(self.learning_rate > 0, "a positive number"),
            warmup_steps=(self.warmup_steps >= 0, "0 or more"),
            decay=(0 <= self.decay <= 1, "0..1"),
            betas=(all(0 <= beta < 1 for beta in self.betas), "two numbers in 0 <= beta < 1"),
            weight_decay=(self.weight_decay >= 0, "0 or more"),
            max_grad_norm=(clip is None or clip > 0, "a positive number or none"),
            ema_decay=(0 <= self.ema_decay < 1, "0 <= decay < 1"),
            average_steps=often("average_steps"),
            label_dropout=(0 <= self.label_dropout <= 1, "0..1"),
            half_log_snr=(
                drawn is None
                or (learns_noise and math.isfinite(drawn[0]) and 0 < drawn[1] < math.inf),
                "mean and standard deviation, a positive number, or none; none with a teacher",
            ),
            min_snr=(
                self.min_snr is None or (learns_noise and 0 < self.min_snr < math.inf),
                "a positive number, or none; none with a teacher",
            ),
            sharding=(
                self.sharding == "none" or self.precision != "fp16",
                "none, or fsdp2 with precision bf16 or fp32: the gradient scaler of fp16 "
                "does not support shards",
            ),
            pixel_scale=(
                self.pixel_scale is None or self.pixel_scale[1] > 0,
                "mean and standard deviation, a positive number, or none",
            ),
            workers=(self.workers >= 0, "0 or more"),
            checkpoint_minutes=(self.checkpoint_minutes > 0, "a positive number"),
            milestone_steps=often("milestone_steps"),
            milestones=often("milestones"),
            log_steps=often("log_steps"),
            sample_steps=often("sample_steps"),
            score_steps=often("score_steps"),
            score_images=(self.score_images > 1, "2 or more"),
            seed=check_seed(self.seed),
        )

    @classmethod
    def read(
        cls, source: str | Path | None, changes: Sequence[str] = (), output: Path | None = None
    ) -> Self:
        """Read the settings of a YAML file, or of the shipped recipe of that name.

        `changes` are words like "batch_size=64" whose values are YAML; values of text settings are
        taken as they are, here and in the file, although YAML reads 0123 as a number. `output`
        replaces the file's. Other settings keep their defaults. Raises ValueError naming a setting
        that is unknown, given twice or of another type, and FileNotFoundError where the file is
        missing.
        """
        texts = text_settings(cls)
        values = {} if source is None else _read_yaml(source, texts)
        for word in changes:
            key, equals, text = word.partition("=")
            require(bool(equals), "set", word, "KEY=VALUE")
            values[key] = text if key in texts else _parse(text, key)
        if output is not None:
            values["output"] = str(output)
        require("output" in values, "output", None, "the folder of the run")
        return load_settings(cls, values)

    def write(self, path: Path) -> None:
        """Write all settings as YAML, which `read` reads."""
        write_atomically(
            path, lambda part: part.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values (YAML, JSON)."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings that must not change when the run is resumed."""
        values = self.to_dict().items()
        return {name: value for name, value in values if name not in RESUME_OVERRIDES}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def shipped_recipes() -> dict[str, Path]:
    """Return the paths of the package's YAML recipes, by the name that `read` takes."""
    folder = Path(str(resources.files("dimr_fast") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _read_yaml(source: str | Path, texts: set[str]) -> dict[str, Any]:
    path = shipped_recipes().get(str(source), Path(os.path.expanduser(source)))
    if not path.is_file():
        raise FileNotFoundError(
            f"config: got {str(source)!r}, expected a YAML file or one of "
            f"{', '.join(shipped_recipes())}"
        )
    values: dict[str, Any] = {}
    with _yaml_errors(str(path)):
        # From bytes PyYAML recognises UTF-8 and UTF-16.
        loader = _Loader(path.read_bytes())
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            found = type(loader.construct_object(root)).__name__ if root else "nothing"
            raise ValueError(f"{path}: got {found}, expected settings as KEY: VALUE")
        for key, node in root.value:
            if key.value in values:
                raise ValueError(f"{path}: got {key.value} twice, expected each setting once")
            value = loader.construct_object(node, deep=True)
            is_text = key.value in texts and isinstance(node, yaml.ScalarNode)
            values[key.value] = node.value if is_text and value is not None else value
    return values


class _Loader(yaml.SafeLoader):
    """Load plain YAML in which 1e-4 is a number, as YAML 1.2 says; PyYAML takes it for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), "-+0123456789"
)


def _parse(text: str, where: str) -> Any:
    with _yaml_errors(where):
        return yaml.load(text, _Loader)


@contextmanager
def _yaml_errors(where: str) -> Iterator[None]:
    try:
        yield
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from error
