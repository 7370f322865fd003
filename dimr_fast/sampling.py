"""Draw images from a trained model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dimr_fast.checkpoint import TrainedModel, load_model
from dimr_fast.device import Precision, resolve_device, resolve_precision
from dimr_fast.diffusion import (
    ConstantGuidance,
    DiscreteSchedule,
    dpm_solver_singlestep,
    guided,
)
from dimr_fast.files import write_json
from dimr_fast.pictures import image_grid
from dimr_fast.seeds import derived_seed


def sample_images(
    trained: TrainedModel,
    labels: Tensor,
    *,
    steps: int = 25,
    guidance: float = 1.0,
    noise_limit: float = 2.5,
    seed: int = 0,
    batch_size: int = 64,
    precision: Precision = "auto",
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Images of the given classes by DPM-Solver++, clipped to pixels, with constant guidance.

    `labels` is int64 `[N]`; the result uint8 `[N, C, H, W]` on the CPU. Image i starts from noise
    of its own, drawn from `seed` and i on the CPU, so that it does not depend on the batch size,
    and clamped to ±`noise_limit`. `progress` is called with the number of images of each finished
    batch.
    Raises ValueError for labels, steps or a guidance scale out of range.
    """
    model = trained.model
    config = model.config
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels: got {labels.dtype} {tuple(labels.shape)}, expected int64 [N]")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < config.num_classes:
        raise ValueError(f"labels: got {labels.tolist()}, expected 0..{config.num_classes - 1}")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    if seed < 0:
        raise ValueError(f"seed: got {seed}, expected 0 or more")
    device = next(model.parameters()).device
    dtype = resolve_precision(precision, device)
    schedule = DiscreteSchedule()

    def predict(x: Tensor, condition: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(x, log_snr=condition, y=y)[-1]

    shape = (config.channels, *config.image_size)
    images = []
    for indices in torch.arange(len(labels)).split(batch_size) if len(labels) else ():
        noise = torch.stack([_noise(shape, seed, int(i)) for i in indices])
        noise = noise.clamp(-noise_limit, noise_limit)
        noise_fn = guided(
            predict, labels[indices].to(device), config.null_class, ConstantGuidance(guidance)
        )
        with torch.inference_mode():
            x = dpm_solver_singlestep(
                noise_fn, noise.to(device), schedule, steps, clip=trained.pixels.range
            )
        images.append(trained.pixels.to_pixels(x).cpu())
        if progress is not None:
            progress(len(indices))
    return torch.cat(images) if images else torch.empty(0, *shape, dtype=torch.uint8)


def _noise(shape: tuple[int, ...], seed: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(derived_seed(seed, index))
    return torch.randn(shape, generator=generator)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Which images to draw, from what, and how."""

    checkpoint: Path
    """A checkpoint that training wrote; its EMA weights are used."""
    output: Path
    """Folder for `grid.png`, one row a class, and `sample.json`; must not hold them yet."""
    per_class: int = 10
    steps: int = 25
    """Network evaluations per image."""
    guidance: float = 1.0
    """Scale of constant guidance; 0 is none."""
    noise_limit: float = 2.5
    """Start noise is clamped to ± this: a briefly trained model underestimates rarer values, which
    then stay behind as bright dots. `inf` leaves it as drawn."""
    batch_size: int = 64
    precision: Precision = "auto"
    device: str = "auto"
    seed: int = 0

    def validate(self) -> None:
        """ValueError naming a setting that is out of range."""
        for name in ("per_class", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, expected 0 or more")
        if not self.noise_limit > 0:
            raise ValueError(f"noise_limit: got {self.noise_limit}, expected a positive number")
        if not self.guidance >= 0:
            raise ValueError(f"guidance: got {self.guidance}, expected 0 or more")


def sample(config: SampleConfig) -> Path:
    """Draw a grid of images, one row a class, with a progress bar; returns the picture's path.

    Raises, before any work, ValueError for an unusable setting, CheckpointError for an unusable
    checkpoint, FileExistsError where the picture is there already and OSError where it cannot be
    written.
    """
    config.validate()
    grid = config.output / "grid.png"
    if grid.exists():
        raise FileExistsError(f"{grid} exists already; choose another output")
    device = resolve_device(config.device)
    trained = load_model(config.checkpoint)
    trained.model.to(device)
    classes = trained.classes
    config.output.mkdir(parents=True, exist_ok=True)
    labels = torch.arange(len(classes)).repeat_interleave(config.per_class)
    with tqdm(total=len(labels), unit="image", desc="sampling") as bar:
        images = sample_images(
            trained,
            labels,
            steps=config.steps,
            guidance=config.guidance,
            noise_limit=config.noise_limit,
            seed=config.seed,
            batch_size=config.batch_size,
            precision=config.precision,
            progress=bar.update,
        )
    image_grid(images.unflatten(0, (len(classes), config.per_class)), classes, grid)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(config).items()}
    write_json(config.output / "sample.json", settings)
    return grid
