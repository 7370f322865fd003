"""Train the arms of `models.py` alike, and score the images that they generate.

    python -m benchmarks.ablation.run --state FOLDER --minutes 15 --seeds 0 1 2
    python -m benchmarks.ablation.run --state FOLDER --minutes 45 --arms c d e f \\
        --name ablation_long

Every arm gets the same CPU time of one thread, not the same number of steps. The arms take turns in
slices of that time, so that other load on the machine affects all alike. Each slice ends with a
checkpoint in the state folder, from which the same command resumes. When the arms of a seed are
trained they are scored, and `ablation.json`, or NAME.json, and its plot are rewritten.
"""

import fcntl
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.ablation.models import ARMS, SIDE
from benchmarks.ablation.report import CODE, RESULT, collect, draw_ablation
from benchmarks.utils import machine
from dimr_fast.checkpoint import load_checkpoint, save_checkpoint
from dimr_fast.data.scaling import PixelScale
from dimr_fast.data.tiles import Tiles, load_tiles
from dimr_fast.diffusion import (
    ConstantGuidance,
    DiscreteSchedule,
    dpm_solver_singlestep,
    guided,
    multi_scale_loss,
)
from dimr_fast.evaluation import frechet_to_reference
from dimr_fast.evaluation.features import EfficientNetLite0Features
from dimr_fast.evaluation.image_sets import TensorImages
from dimr_fast.evaluation.statistics import compute_statistics
from dimr_fast.model import DiMR
from dimr_fast.optim import EMA, adamw
from dimr_fast.utils.device import DTYPES, keep_freed_memory, precision_name, resolve_precision
from dimr_fast.utils.files import write_json
from dimr_fast.utils.seeds import derived_seed
from dimr_fast.utils.validation import require_fields

BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.99), 0.03, 1.0
LABEL_DROPOUT = 0.1
EMA_DECAY = 0.9999
WARMUP, DECAY = 0.03, 0.5
"""Shares of the training time in which the learning rate rises at first and falls to zero at last;
both linearly."""
NOISE_LIMIT = 2.5
"""Bound on the initial noise of samples, the default of `dimr_fast.sampling`."""
SCORING_BATCH = 64
RESUME_OVERRIDES = ("state", "output", "name", "arms", "seeds", "slice_seconds")
"""Settings that a resumed run may change; the others are its recipe."""
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of training and scoring."""

    state: Path
    """Folder of checkpoints and scores, from which the same command resumes."""
    output: Path = RESULT.parent
    """Folder of the result, and of `plots/` with its plot."""
    name: str = RESULT.stem
    """Name of result and plot, without `.json` and `.png`."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Letters of the arms that are trained."""
    minutes: float = 15.0
    """CPU time of one thread for which each arm trains."""
    seeds: tuple[int, ...] = (0,)
    """Every arm is trained once with each seed."""
    slice_seconds: float = 60.0
    """CPU time after which the next arm continues."""
    batch_size: int = 16
    learning_rate: float = 2e-3
    """The same for all arms, tuned for none."""
    samples: int = 1024
    """Images generated for the score, with the labels of as many random training tiles."""
    sampling_steps: int = 25
    guidance: float = 0.0
    """Scale of constant guidance; 0 means none."""

    def validate(self) -> None:
        """Raise ValueError naming a setting that is out of range."""
        require_fields(
            self,
            name=(self.name == Path(self.name).name != "", "a file name"),
            arms=(
                0 < len(self.arms) == len(set(self.arms)) and set(self.arms) <= set(ARMS),
                f"some of {' '.join(ARMS)}, each once",
            ),
            minutes=(self.minutes > 0, "a positive number"),
            seeds=(all(seed >= 0 for seed in self.seeds), "numbers, 0 or more"),
            slice_seconds=(self.slice_seconds > 0, "a positive number"),
            batch_size=(self.batch_size > 0, "a positive number"),
            learning_rate=(self.learning_rate > 0, "a positive number"),
            samples=(self.samples > 1, "two or more"),
            sampling_steps=(self.sampling_steps > 0, "1 or more"),
            guidance=(self.guidance >= 0, "0 or more"),
        )

    def recipe(self) -> dict[str, Any]:
        """Return the settings that a result depends on."""
        return {key: value for key, value in vars(self).items() if key not in RESUME_OVERRIDES}


class TileBatches:
    """Batches of tiles that depend on seed and step only, so that all arms see the same."""

    def __init__(self, tiles: Tiles) -> None:
        self.tiles = tiles
        self.scale = PixelScale.of(tiles.train_images)
        self.null_class = len(tiles.classes)
        self.schedule = DiscreteSchedule()

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return images (half mirrored), labels (some dropped), discrete steps and noise."""
        generator = torch.Generator().manual_seed(derived_seed(seed, 0, step))
        indices = torch.randint(len(self.tiles.train_images), (size,), generator=generator)
        mirrored = torch.rand(size, 1, 1, 1, generator=generator) < 0.5
        dropped = torch.rand(size, generator=generator) < LABEL_DROPOUT
        steps = torch.randint(1, self.schedule.num_steps + 1, (size,), generator=generator)
        x = self.scale.to_model(self.tiles.train_images[indices])
        noise = torch.randn(x.shape, generator=generator)
        y = self.tiles.train_labels[indices].masked_fill(dropped, self.null_class)
        return torch.where(mirrored, x.flip(3), x), y, steps, noise

    def held_out(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield held-out tiles, labels, evenly spread steps and noise; always the same."""
        generator = torch.Generator().manual_seed(0)
        images, labels = self.tiles.val_images, self.tiles.val_labels
        order = torch.randperm(len(images), generator=generator)
        steps = 1 + order * self.schedule.num_steps // len(images)
        parts = [tensor.split(SCORING_BATCH) for tensor in (images, labels, steps)]
        for x, y, step in zip(*parts, strict=True):
            noise = torch.randn(x.shape, generator=generator)
            yield self.scale.to_model(x), y, step, noise


class TrainingRun:
    """The training of one arm with one seed: the state that a checkpoint contains."""

    def __init__(self, key: str, seed: int, num_classes: int) -> None:
        self.key, self.arm, self.seed = key, ARMS[key], seed
        torch.manual_seed(derived_seed(seed, 1))
        self.model: DiMR = self.arm.build(num_classes)
        self.optimizer = adamw(self.model, 0.0, betas=BETAS, weight_decay=WEIGHT_DECAY)
        self.ema = EMA(self.model)
        self.step = 0
        self.skipped = 0
        self.seconds = 0.0

    def take_step(
        self,
        data: TileBatches,
        settings: Settings,
        progress: float,
        dtype: torch.dtype,
        loss_function: Callable[..., Tensor] = multi_scale_loss,
    ) -> float:
        """Take one step at `progress` (0 to 1) of the training; return the full-resolution loss.

        A step whose gradient is not finite changes no parameter and is counted in `skipped`.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_factor(progress)
        x0, y, n, noise = data.batch(self.seed, self.step, settings.batch_size)
        predictions = predict(self.model, data.schedule, x0, y, n, noise, dtype)
        last = loss_function(predictions[-1:], noise).mean()
        loss = loss_function(predictions, noise).mean() if self.arm.multi_scale else last
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        if norm.isfinite():
            self.optimizer.step()
            self.ema.update(min(EMA_DECAY, (1 + self.step) / (10 + self.step)))
        else:
            self.skipped += 1
        self.step += 1
        return last.item()

    def save(self, path: Path) -> None:
        """Write model, EMA, optimizer state and progress."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.tensors.items()}
        for name, parameter in self.model.named_parameters():
            # Heads that contribute to no loss have no state.
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        progress = {"step": self.step, "skipped": self.skipped, "seconds": self.seconds}
        save_checkpoint(path, tensors, progress)

    def load(self, path: Path) -> None:
        """Restore what `save` wrote for the same arm and seed."""
        tensors, progress = load_checkpoint(path)
        weights = {name: tensors[f"model.{name}"] for name in self.model.state_dict()}
        self.model.load_state_dict(weights, strict=True)
        for name, value in self.ema.tensors.items():
            value.copy_(tensors[f"ema.{name}"])
        for name, parameter in self.model.named_parameters():
            state = {
                key: tensors[f"optimizer.{key}.{name}"]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"optimizer.{key}.{name}" in tensors
            }
            if state:
                self.optimizer.state[parameter] = state
        self.step, self.skipped = progress["step"], progress["skipped"]
        self.seconds = progress["seconds"]

    def averaged(self) -> DiMR:
        """Return the model with its averaged weights; training cannot continue afterwards."""
        self.model.load_state_dict(self.ema.tensors, strict=True)
        return self.model.eval()


def learning_rate_factor(progress: float) -> float:
    """Return the factor of the learning rate at `progress` (0 to 1) of the training."""
    return min(1.0, progress / WARMUP, max(0.0, 1 - progress) / DECAY)


def predict(
    model: DiMR,
    schedule: DiscreteSchedule,
    x0: Tensor,
    y: Tensor,
    n: Tensor,
    noise: Tensor,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return the model's predictions of the noise in images at discrete steps `n`."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return model(schedule.add_noise(x0, noise, n), log_snr=schedule.condition(n), y=y)


def train(
    runs: list[TrainingRun], data: TileBatches, settings: Settings, dtype: torch.dtype
) -> None:
    """Train all runs in turns until each has had its CPU time; save a run after each turn."""
    budget = 60 * settings.minutes
    while unfinished := [run for run in runs if run.seconds < budget]:
        for run in unfinished:
            end = min(run.seconds + settings.slice_seconds, budget)
            first, before, losses = run.step, run.seconds, []
            while run.seconds < end:
                begun = time.process_time()
                losses.append(run.take_step(data, settings, run.seconds / budget, dtype))
                run.seconds += time.process_time() - begun
            run.save(checkpoint_path(settings, run))
            rate = (run.step - first) * settings.batch_size / (run.seconds - before)
            print(
                f"{time.strftime('%H:%M:%S')} seed {run.seed} arm {run.key}: "
                f"{run.seconds:.0f} of {budget:.0f} CPU seconds, step {run.step}, "
                f"loss {math.fsum(losses) / len(losses):.4f}, {rate:.1f} images/s, "
                f"{run.skipped} skipped",
                flush=True,
            )


class Scorer:
    """Score a model's images against the held-out tiles."""

    def __init__(self, data: TileBatches, settings: Settings, dtype: torch.dtype) -> None:
        self.data, self.settings, self.dtype = data, settings, dtype
        self.features = EfficientNetLite0Features()
        self.reference = compute_statistics(
            self.features, TensorImages(data.tiles.val_images, "held-out tiles")
        )
        generator = torch.Generator().manual_seed(0)
        images = data.tiles.train_images
        chosen = torch.randperm(len(images), generator=generator)[: settings.samples]
        self.labels = data.tiles.train_labels[chosen]
        self.training = self.distance(images[chosen])

    def distance(self, images: Tensor) -> float:
        """Return the Fréchet distance of uint8 images [N, 3, h, w] to the held-out tiles."""
        return frechet_to_reference(self.features, images, self.reference)

    def score(self, run: TrainingRun) -> dict[str, Any]:
        """Return a run's entry of the result."""
        model = run.averaged()
        images = generate(model, self.labels, self.data, self.settings, self.dtype, run.seed)
        return {
            "arm": run.key,
            "seed": run.seed,
            "steps": run.step,
            "skipped_steps": run.skipped,
            "cpu_seconds": run.seconds,
            "images_per_cpu_second": run.step * self.settings.batch_size / run.seconds,
            "held_out_loss": held_out_loss(model, self.data, self.dtype),
            "frechet": self.distance(images),
            "frechet_training": self.training,
            "frechet_recipe": f"{self.features.recipe}, {self.settings.samples} images against "
            f"{len(self.data.tiles.val_images)} held-out tiles",
        }


@torch.no_grad()
def held_out_loss(model: DiMR, data: TileBatches, dtype: torch.dtype) -> float:
    """Return the mean squared error of the noise at full resolution; predicting 0 gives 1."""
    losses = []
    for x0, y, n, noise in data.held_out():
        predictions = predict(model, data.schedule, x0, y, n, noise, dtype)
        losses.append(multi_scale_loss(predictions[-1:], noise))
    return torch.cat(losses).mean().item()


@torch.no_grad()
def generate(
    model: DiMR,
    labels: Tensor,
    data: TileBatches,
    settings: Settings,
    dtype: torch.dtype,
    seed: int,
) -> Tensor:
    """Generate uint8 images [N, 3, H, W] of the labels, from the same noise in all arms."""

    def noise_of(x: Tensor, condition: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model(x, log_snr=condition, y=y)[-1]

    generator = torch.Generator().manual_seed(derived_seed(seed, 2))
    guidance, images = ConstantGuidance(settings.guidance), []
    for y in labels.split(SCORING_BATCH):
        noise = torch.randn(len(y), 3, SIDE, SIDE, generator=generator)
        x = dpm_solver_singlestep(
            guided(noise_of, y, data.null_class, guidance),
            noise.clamp(-NOISE_LIMIT, NOISE_LIMIT),
            data.schedule,
            settings.sampling_steps,
            clip=data.scale.range,
        )
        images.append(data.scale.to_pixels(x))
    return torch.cat(images)


def checkpoint_path(settings: Settings, run: TrainingRun) -> Path:
    """Return the path of a run's checkpoint."""
    return settings.state / f"seed{run.seed}_{run.key}.safetensors"


@contextmanager
def locked_state(settings: Settings) -> Iterator[torch.dtype]:
    """Lock the state folder for this process; give the precision of all runs in it.

    Raises ValueError if the folder belongs to another recipe, BlockingIOError if it is locked.
    """
    settings.state.mkdir(parents=True, exist_ok=True)
    with (settings.state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"{settings.state}: locked by another process") from error
        path, ours = settings.state / "recipe.json", settings.recipe()
        if not path.exists():
            write_json(path, ours | {"precision": precision_name(resolve_precision("auto", CPU))})
        found = json.loads(path.read_text())
        precision = found.pop("precision")
        if found != ours:
            raise ValueError(f"state: got {settings.state}, of recipe {found}, expected {ours}")
        yield DTYPES[precision]


def ablate(settings: Settings) -> Path:
    """Train and score the arms that are not yet; return the path of the result.

    Raises ValueError for a setting out of range or a state folder of another recipe,
    BlockingIOError if another process has locked the folder, DataUnavailableError without the tiles
    or the network.
    """
    settings.validate()
    commit = machine.commit(*CODE)
    torch.set_num_threads(1)
    keep_freed_memory()
    data, scorer = TileBatches(load_tiles(SIDE, 16)), None
    result = settings.output / f"{settings.name}.json"
    with locked_state(settings) as dtype:
        for seed in settings.seeds:
            runs = [TrainingRun(key, seed, data.null_class + 1) for key in settings.arms]
            for run in runs:
                if checkpoint_path(settings, run).exists():
                    run.load(checkpoint_path(settings, run))
            train(runs, data, settings, dtype)
            for run in runs:
                path = checkpoint_path(settings, run).with_suffix(".json")
                if not path.exists():
                    scorer = scorer or Scorer(data, settings, dtype)
                    write_json(path, scorer.score(run))
                print(f"seed {seed} arm {run.key}: {path.read_text()}", flush=True)
            report = collect(settings.state, commit)
            plot = settings.output / "plots" / f"{settings.name}.png"
            plot.parent.mkdir(parents=True, exist_ok=True)
            write_json(result, report)
            draw_ablation(report, plot)
    return result


if __name__ == "__main__":
    print("wrote", ablate(tyro.cli(Settings)))
