"""Train a model on labelled images."""

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dimr_fast.checkpoint import EMA_PREFIX, CheckpointError, load_checkpoint, save_checkpoint
from dimr_fast.config import preset, require_fields
from dimr_fast.data.scaling import PixelScale, scale_to_dict
from dimr_fast.data.tiles import load_tiles
from dimr_fast.device import (
    Precision,
    device_name,
    keep_freed_memory,
    precision_name,
    resolve_device,
    resolve_precision,
)
from dimr_fast.diffusion import DiscreteSchedule, multi_scale_loss
from dimr_fast.files import claim, write_json
from dimr_fast.model import DiMR
from dimr_fast.optim import EMA, adamw
from dimr_fast.pictures import loss_curve, require_matplotlib
from dimr_fast.seeds import derived_seed

CHECKPOINT = "checkpoint.safetensors"
FILES = (CHECKPOINT, "loss.png", "train.json")
"""What a run leaves in its folder."""

FREE = {"output", "minutes", "steps", "checkpoint_minutes", "device"}
"""The settings that a resumed run may change; the others are its recipe."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, how long and how. The defaults are the recipe of the demo."""

    output: Path
    """Folder of the run; must not hold one unless it is resumed."""
    preset: str = "demo"
    """Name of a preset; its class count and size follow the data."""
    data: str = "tiles"
    """"tiles": the satellite tiles of the installed data package."""
    minutes: float | None = 10.0
    """Stop after this much training time."""
    steps: int | None = None
    """Stop after this many steps; whichever of the two comes first."""
    batch_size: int = 32
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
    """Reached by (1 + n)/(10 + n) at step n, so that a short run averages over its last tenth."""
    label_dropout: float = 0.1
    """Share of the labels replaced by the null class, for guidance."""
    checkpoint_minutes: float = 2.0
    """Write a checkpoint this often, and at the end."""
    precision: Precision = "auto"
    device: str = "auto"
    seed: int = 0

    def validate(self) -> None:
        """ValueError naming a setting that is out of range."""
        minutes, clip = self.minutes, self.max_grad_norm
        timed = self.steps is not None if minutes is None else minutes > 0
        require_fields(
            self,
            data=(self.data == "tiles", "'tiles'"),
            minutes=(timed, "a positive number, or None beside steps"),
            steps=(self.steps is None or self.steps > 0, "a positive number"),
            batch_size=(self.batch_size > 0, "a positive number"),
            learning_rate=(self.learning_rate > 0, "a positive number"),
            warmup_steps=(self.warmup_steps >= 0, "0 or more"),
            decay=(0 <= self.decay <= 1, "0..1"),
            betas=(all(0 <= beta < 1 for beta in self.betas), "two numbers in 0 <= beta < 1"),
            weight_decay=(self.weight_decay >= 0, "0 or more"),
            max_grad_norm=(clip is None or clip > 0, "a positive number or None"),
            ema_decay=(0 <= self.ema_decay < 1, "0 <= decay < 1"),
            label_dropout=(0 <= self.label_dropout < 1, "0 <= share < 1"),
            checkpoint_minutes=(self.checkpoint_minutes > 0, "a positive number"),
            seed=(self.seed >= 0, "0 or more"),
        )

    def command(self) -> str:
        """The command line that trains so."""
        words = ["dimr-fast train"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
                words.append(f"--{field.name.replace('_', '-')} {text}")
        return " ".join(words)


@dataclass(frozen=True)
class TrainSummary:
    """How a run went; losses are means over its first 20 and last 100 steps."""

    steps: int
    seconds: float
    images_per_second: float
    first_loss: float
    last_loss: float
    parameters: int
    device: str
    precision: str
    torch: str
    interrupted: bool

    def sentence(self, config: TrainConfig) -> str:
        """The end of the run in words; how to go on, where it was interrupted."""
        verb = "stopped" if self.interrupted else "trained"
        text = (
            f"{verb} at step {self.steps:,} after {self.seconds / 60:.1f} minutes "
            f"({self.images_per_second:.0f} images/s, {self.parameters / 1e6:.1f}M parameters, "
            f"{self.precision}, {self.device}); "
            f"loss {self.first_loss:.3f} -> {self.last_loss:.3f}; "
            f"wrote {config.output / CHECKPOINT}"
        )
        if self.interrupted:
            text += f"\ngo on with: {config.command()} --resume"
        return text


@dataclass
class _Run:
    """Everything of a run that a checkpoint holds."""

    model: DiMR
    classes: tuple[str, ...]
    scale: PixelScale
    settings: dict[str, Any]
    optimizer: torch.optim.AdamW
    step: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.ema = EMA(self.model)
        self.losses: list[float] = []

    def progress(self, config: TrainConfig) -> float:
        """How far the run has come, from 0 to 1 and beyond."""
        by_time = self.seconds / (60 * config.minutes) if config.minutes else 0.0
        return max(by_time, self.step / config.steps if config.steps else 0.0)

    def save(self, path: Path) -> None:
        """Write model, EMA and optimizer state, and how far the run has come."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"{EMA_PREFIX}{name}": value for name, value in self.ema.tensors.items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        tensors["losses"] = torch.tensor(self.losses)
        metadata = {
            "config": self.model.config.to_dict(),
            "classes": self.classes,
            "scale": scale_to_dict(self.scale),
            "settings": self.settings,
            "step": self.step,
            "seconds": self.seconds,
        }
        save_checkpoint(path, tensors, metadata)

    def load(self, path: Path) -> None:
        """Take over a checkpoint of the same model and recipe; CheckpointError for any other."""
        tensors, metadata = load_checkpoint(path)
        if metadata.get("config") != json.loads(json.dumps(self.model.config.to_dict())):
            raise CheckpointError(f"{path}: holds another model than this run trains")
        for name, value in metadata.get("settings", {}).items():
            ours = json.loads(json.dumps(self.settings.get(name)))
            if ours == "auto":
                self.settings[name] = value
            elif ours != value:
                raise CheckpointError(f"{path}: was trained with {name} {value}, not {ours}")
        try:
            self.step, self.seconds = metadata["step"], metadata["seconds"]
            self.losses = tensors["losses"].tolist()
            weights = {name: tensors[f"model.{name}"] for name in self.model.state_dict()}
            self.model.load_state_dict(weights, strict=True)
            for name, value in self.ema.tensors.items():
                value.copy_(tensors[f"{EMA_PREFIX}{name}"])
            # AdamW has no state before its first step.
            keys = ("step", "exp_avg", "exp_avg_sq") if self.step else ()
            for name, parameter in self.model.named_parameters():
                self.optimizer.state[parameter] = {
                    key: tensors[f"optimizer.{key}.{name}"].to(parameter.device) for key in keys
                }
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path}: not a checkpoint of this run ({error})") from error


def train(config: TrainConfig, *, resume: bool = False) -> TrainSummary:
    """Train as `config` says, with a progress bar.

    Writes `checkpoint.safetensors` (model, its EMA, optimizer, position of the run), `loss.png` and
    `train.json` to `config.output`; the checkpoint also every `checkpoint_minutes`. Ctrl-C ends the
    run after the step in progress, with all three written; a second one ends it at once. With
    `resume` the run in `config.output` goes on. All randomness of step n comes from the seed and n,
    so a run of a given number of steps that was interrupted ends as one that was not.

    Raises, before any work, ValueError for an unusable setting, FileExistsError where `output`
    holds a run, OSError where it cannot be written, CheckpointError where there is none to resume
    and DataUnavailableError without the data; FloatingPointError when the loss is no longer finite
    (the last checkpoint stays).
    """
    config.validate()
    path = config.output / CHECKPOINT
    if path.exists() and not resume:
        raise FileExistsError(f"{path} exists already; --resume it or choose another output")
    require_matplotlib()
    device = resolve_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    images, labels, classes = _load_data(config)
    scale = PixelScale.of(images)
    model_config = preset(config.preset, num_classes=len(classes) + 1)

    torch.manual_seed(config.seed)
    model = DiMR(model_config).to(device)
    recipe = {name: value for name, value in vars(config).items() if name not in FREE}
    optimizer = adamw(
        model, config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    run = _Run(model, classes, scale, recipe, optimizer)
    if resume:
        run.load(path)
    else:
        claim(config.output, FILES)
    # Timing the machine again on a resumed run might choose otherwise.
    dtype = resolve_precision(run.settings["precision"], device)
    run.settings["precision"] = precision_name(dtype)
    run.save(path)
    with _stop_on_signal() as stopped:
        _loop(run, config, images.to(device), labels.to(device), dtype, stopped)
    run.save(path)
    summary = TrainSummary(
        steps=run.step,
        seconds=run.seconds,
        images_per_second=run.step * config.batch_size / run.seconds if run.seconds else 0.0,
        first_loss=_mean(run.losses[:20]),
        last_loss=_mean(run.losses[-100:]),
        parameters=sum(p.numel() for p in model.parameters()),
        device=device_name(device),
        precision=precision_name(dtype),
        torch=torch.__version__,
        interrupted=stopped(),
    )
    if run.losses:
        loss_curve(run.losses, config.output / "loss.png")
    settings = dataclasses.asdict(config) | {"output": str(config.output)}
    write_json(
        config.output / "train.json", {"config": settings, "result": dataclasses.asdict(summary)}
    )
    return summary


def _load_data(config: TrainConfig) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images uint8 `[N, C, H, W]` of the preset's size, their labels, and the class names."""
    size = preset(config.preset).image_size
    channels = preset(config.preset).channels
    if channels != 3 or size[0] != size[1]:
        raise ValueError(
            f"preset: got {config.preset!r} for {channels}x{size[0]}x{size[1]} inputs, "
            "expected one for square RGB images"
        )
    tiles = load_tiles(size[0], 16)
    return tiles.train_images, tiles.train_labels, tiles.classes


def _loop(
    run: _Run,
    config: TrainConfig,
    images: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    stopped: Callable[[], bool],
) -> None:
    """Take steps until the run is over or `stopped`, saving now and then."""
    device = images.device
    schedule = DiscreteSchedule(device)
    parameters: list[Tensor] = list(run.model.parameters())
    pending: list[Tensor] = []
    # On a GPU every read of a loss waits for the device.
    interval = 1 if device.type == "cpu" else 20
    begun, before, first_step = time.monotonic(), run.seconds, run.step
    saved = begun
    run.model.train()
    with tqdm(total=1.0, initial=run.progress(config), bar_format=BAR, mininterval=0.5) as bar:

        def read_losses() -> None:
            for loss, norm in torch.stack(pending).tolist():
                run.losses.append(loss)
                # A finite loss can have a gradient that is not; the next save would keep its harm.
                if not math.isfinite(loss + norm):
                    raise FloatingPointError(
                        f"loss {loss}, gradient norm {norm} at step {len(run.losses)}; "
                        f"{config.output / CHECKPOINT} holds the last good state"
                    )
            pending.clear()
            rate = (run.step - first_step) * config.batch_size / (run.seconds - before)
            bar.set_postfix_str(
                f"step {run.step}, loss {_mean(run.losses[-100:]):.3f}, {rate:.0f} images/s",
                refresh=False,
            )
            bar.update(min(run.progress(config), 1.0) - bar.n)

        while (progress := run.progress(config)) < 1 and not stopped():
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(config, run.step, progress)
            x0, y = _batch(run, images, labels, config)
            step = torch.randint(1, schedule.num_steps + 1, (len(x0),), device=device)
            noise = torch.randn_like(x0)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                predictions = run.model(
                    schedule.add_noise(x0, noise, step), log_snr=schedule.condition(step), y=y
                )
            loss = multi_scale_loss(predictions, noise).mean()
            run.optimizer.zero_grad()
            loss.backward()
            limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
            norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
            run.optimizer.step()
            decay = min(config.ema_decay, (1 + run.step) / (10 + run.step))
            run.ema.update(decay)
            run.step += 1
            now = time.monotonic()
            run.seconds = before + now - begun
            pending.append(torch.stack([loss.detach(), norm]))
            if len(pending) == interval:
                read_losses()
                if now - saved > 60 * config.checkpoint_minutes:
                    run.save(config.output / CHECKPOINT)
                    saved = now
        if pending:
            read_losses()


BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """The rate at `step`, `progress` (0..1) through the run: warm-up, constant, fall to zero."""
    rise = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    fall = min(1.0, (1 - progress) / config.decay) if config.decay else 1.0
    return config.learning_rate * rise * fall


def _batch(run: _Run, images: Tensor, labels: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Scaled images, half of them mirrored, and labels, some dropped; all from seed and step.

    Every image comes once an epoch, in an order of the epoch's own.
    """
    count, batch, device = len(images), config.batch_size, images.device
    first = run.step * batch
    epochs = range(first // count, (first + batch - 1) // count + 1)
    order = torch.cat([_permutation(count, config.seed, epoch) for epoch in epochs])
    indices = order[first - epochs[0] * count :][:batch].to(device)
    torch.manual_seed(derived_seed(config.seed, 0, run.step))
    x = run.scale.to_model(images[indices])
    mirrored = torch.rand(batch, 1, 1, 1, device=device) < 0.5
    dropped = torch.rand(batch, device=device) < config.label_dropout
    return torch.where(mirrored, x.flip(3), x), labels[indices].masked_fill(
        dropped, run.model.config.null_class
    )


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(derived_seed(seed, 1, epoch))
    return torch.randperm(count, generator=generator)


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag that the block can read."""
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}

    def receive(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    # Only the main thread may set handlers; elsewhere signals act as they always do.
    if threading.current_thread() is threading.main_thread():
        for name in (signal.SIGINT, signal.SIGTERM):
            previous[name] = signal.signal(name, receive)
    try:
        yield lambda: bool(received)
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
