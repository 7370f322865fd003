"""Draw images from a trained model."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dimr_fast.checkpoint import TrainedModel, load_model
from dimr_fast.config import require_fields
from dimr_fast.device import (
    Precision,
    keep_freed_memory,
    resolve_device,
    resolve_precision,
)
from dimr_fast.diffusion import (
    ConstantGuidance,
    DiscreteSchedule,
    dpm_solver_singlestep,
    guided,
)
from dimr_fast.files import claim, write_json
from dimr_fast.inference import optimize_for_inference
from dimr_fast.pictures import image_grid
from dimr_fast.seeds import derived_seed


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How images are drawn: DPM-Solver++, clipped to pixels, with constant guidance."""

    steps: int = 25
    """Network evaluations per image."""
    guidance: float = 1.0
    """Scale of constant guidance; 0 is none."""
    noise_limit: float = 2.5
    """Start noise is clamped to ± this: a briefly trained model underestimates rarer values, which
    then stay behind as bright dots. `inf` leaves it as drawn."""
    batch_size: int = 64
    precision: Precision = "auto"
    seed: int = 0

    def validate(self) -> None:
        """ValueError naming a setting that is out of range."""
        guided = self.guidance >= 0 and math.isfinite(self.guidance)
        require_fields(
            self,
            steps=(self.steps > 0, "1 or more"),
            guidance=(guided, "a finite number, 0 or more"),
            noise_limit=(self.noise_limit > 0, "a positive number"),
            batch_size=(self.batch_size > 0, "1 or more"),
            seed=(self.seed >= 0, "0 or more"),
        )


def sample_images(
    trained: TrainedModel,
    labels: Tensor,
    sampler: Sampler,
    *,
    first: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Images of the given classes.

    `labels` is int64 `[N]`; the result uint8 `[N, C, H, W]` on the CPU. Image i starts from noise
    of its own, drawn on the CPU from the seed and `first + i`, so that it does not depend on the
    batch size. `progress` is called with the number of images of each finished batch.
    Raises ValueError for labels or settings out of range.
    """
    sampler.validate()
    config = trained.model.config
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels: got {labels.dtype} {tuple(labels.shape)}, expected int64 [N]")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < config.num_classes:
        raise ValueError(f"labels: got {labels.tolist()}, expected 0..{config.num_classes - 1}")
    device = next(trained.model.parameters()).device
    model = optimize_for_inference(trained.model, resolve_precision(sampler.precision, device))
    schedule = DiscreteSchedule()
    guidance = ConstantGuidance(sampler.guidance)

    def predict(x: Tensor, condition: Tensor, y: Tensor) -> Tensor:
        return model(x, log_snr=condition, y=y, last_only=True)[0]

    shape = (config.channels, *config.image_size)
    images = torch.empty(len(labels), *shape, dtype=torch.uint8)
    for start in range(0, len(labels), sampler.batch_size):
        y = labels[start : start + sampler.batch_size].to(device)
        drawn = [_noise(shape, sampler.seed, first + start + i) for i in range(len(y))]
        noise = torch.stack(drawn).clamp(-sampler.noise_limit, sampler.noise_limit).to(device)
        with torch.inference_mode():
            x = dpm_solver_singlestep(
                guided(predict, y, config.null_class, guidance),
                noise,
                schedule,
                sampler.steps,
                clip=trained.scale.range,
            )
        images[start : start + len(y)] = trained.scale.to_pixels(x).cpu()
        if progress is not None:
            progress(len(y))
    return images


def balanced_labels(count: int, num_classes: int) -> Tensor:
    """int64 [count]: each class as often as any other, or once more where it does not divide."""
    return torch.arange(count) % num_classes


def _noise(shape: tuple[int, ...], seed: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(derived_seed(seed, index))
    return torch.randn(shape, generator=generator)


FILES = ("grid.png", "sample.json")
"""What `sample` leaves in its folder."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Which images to draw, from what, and how."""

    checkpoint: Path
    """A checkpoint that training wrote; its EMA weights are used."""
    output: Path
    """Folder for `grid.png`, one row a class, and `sample.json`; must not hold them yet."""
    per_class: int = 10
    device: str = "auto"
    sampler: Sampler = Sampler()


def sample(config: SampleConfig) -> Path:
    """Draw a grid of images, one row a class, with a progress bar; returns the picture's path.

    Raises, before any work, ValueError for an unusable setting, CheckpointError for an unusable
    checkpoint, FileExistsError where one of the files is there already and OSError where they
    cannot be written.
    """
    config.sampler.validate()
    require_fields(config, per_class=(config.per_class > 0, "1 or more"))
    device = resolve_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    trained = load_model(config.checkpoint)
    claim(config.output, FILES)
    trained.model.to(device)
    classes = trained.classes
    labels = torch.arange(len(classes)).repeat_interleave(config.per_class)
    with tqdm(total=len(labels), unit="image", desc="sampling") as bar:
        images = sample_images(trained, labels, config.sampler, progress=bar.update)
    grid = config.output / "grid.png"
    image_grid(images.unflatten(0, (len(classes), config.per_class)), classes, grid)
    paths = {"checkpoint": str(config.checkpoint), "output": str(config.output)}
    write_json(config.output / "sample.json", dataclasses.asdict(config) | paths)
    return grid
