"""How images are drawn from a trained model, and the drawing."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from dimr_fast.autoencoder import Decode
from dimr_fast.checkpoint import TrainedModel
from dimr_fast.config import require_fields
from dimr_fast.data.scaling import LatentScale, Scale
from dimr_fast.device import Precision, precision_name, resolve_precision
from dimr_fast.diffusion import (
    SOLVERS,
    ConstantGuidance,
    DiscreteSchedule,
    Guidance,
    PowerCosineGuidance,
    SolverName,
    Spacing,
    guided,
)
from dimr_fast.inference import optimize_for_inference
from dimr_fast.seeds import derived_seed

DECODED_TOGETHER = 8
"""Latents a call of the autoencoder: its activations are far larger than the model's."""

_SOLVERS_IN_WORDS: dict[SolverName, str] = {
    "dpm++": "DPM-Solver++ single-step, order 3",
    "dpm++2m": "DPM-Solver++ multistep, order 2",
    "dpm++3m": "DPM-Solver++ multistep, order 3",
    "ddim": "DDIM, eta 0",
    "heun": "Heun, order 2",
}


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How images are drawn. Times t run from 1, pure noise, to 1/1000."""

    solver: SolverName = "dpm++"
    """dpm++ is the published one, DPM-Solver++ of order 3 in single steps; 2m and 3m are its
    multistep forms."""
    steps: int = 25
    """Network evaluations per image, whatever the solver."""
    spacing: Spacing = "time"
    """Whether the solver's times are uniform in time, as published, or in the log-SNR."""
    guidance: float = 1.0
    """Classifier-free guidance s: ε = ε_c + s·(ε_c − ε_u), with ε_c of the class and ε_u of none.
    0 is none; what others call a scale of 1.4 is 0.4 here."""
    guidance_power: float | None = None
    """A power p lets guidance rise from 0 at t = 1 to s at t = 0: s·½(1 − cos(π·(1 − t)^p)). None
    keeps it constant."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """The least and the largest time that is guided; other evaluations cost half."""
    noise_limit: float | None = None
    """Start noise is clamped to ± this: a briefly trained model underestimates rarer values, which
    then stay behind as bright dots. None is 2.5 for models of pixels and no limit (inf) for models
    of latents."""
    batch_size: int = 64
    precision: Precision = "auto"
    seed: int = 0
    """Image i starts from noise of its own, drawn from this seed and i."""

    def validate(self) -> None:
        """ValueError naming a setting that is out of range."""
        power, interval = self.guidance_power, self.guidance_interval
        require_fields(
            self,
            solver=(self.solver in SOLVERS, f"one of {', '.join(SOLVERS)}"),
            steps=(self.steps > 0, "1 or more"),
            spacing=(self.spacing in ("time", "log_snr"), "time or log_snr"),
            guidance=(0 <= self.guidance < math.inf, "a finite number, 0 or more"),
            guidance_power=(power is None or 0 < power < math.inf, "a positive number, or None"),
            guidance_interval=(interval[0] <= interval[1], "the least time, then the largest"),
            noise_limit=(self.noise_limit is None or self.noise_limit > 0, "a positive number"),
            batch_size=(self.batch_size > 0, "1 or more"),
            precision=(
                self.precision in get_args(Precision),
                f"one of {', '.join(get_args(Precision))}",
            ),
            seed=(self.seed >= 0, "0 or more"),
        )

    def resolved(self, scale: Scale, device: torch.device) -> "Sampler":
        """The same with what was left open decided: precision and noise limit."""
        limit = self.noise_limit
        if limit is None:
            limit = math.inf if isinstance(scale, LatentScale) else 2.5
        precision = precision_name(resolve_precision(self.precision, device))
        return dataclasses.replace(self, noise_limit=limit, precision=precision)

    def recipe(self, scale: Scale, device: torch.device) -> dict[str, Any]:
        """All that a score of the images has to be printed with, as JSON values."""
        resolved = self.resolved(scale, device)
        return {
            **dataclasses.asdict(resolved),
            "solver": _SOLVERS_IN_WORDS[self.solver],
            "guidance_interval": list(self.guidance_interval),
            "noise_limit": resolved.noise_limit if resolved.noise_limit != math.inf else "none",
            "clip": "none" if scale.range is None else "each predicted image, to the pixels' range",
            "start": "noise of its own for each image, from seed and index",
        }

    def guidance_at_each_time(self) -> Guidance:
        """What the settings of guidance mean to the diffusion process."""
        if self.guidance_power is None:
            return ConstantGuidance(self.guidance)
        return PowerCosineGuidance(self.guidance + 1, self.guidance_power)


class ImageSampler:
    """Draws images from one model, which it keeps in the form that samples fastest.

    Building one copies and packs the weights, and on a GPU its first batch of each size captures a
    CUDA graph: build it once for many calls. `trained.model` is on the device to draw on, and later
    changes to it do not show. `decode` makes pixels of a model's latents, which have none
    themselves. Raises ValueError for settings out of range, and for `decode` missing or not wanted.
    """

    def __init__(
        self, trained: TrainedModel, sampler: Sampler, decode: Decode | None = None
    ) -> None:
        sampler.validate()
        if isinstance(trained.scale, LatentScale) and decode is None:
            raise ValueError(
                "autoencoder: got None, expected one to decode what this model draws, latents"
            )
        if not isinstance(trained.scale, LatentScale) and decode is not None:
            raise ValueError("autoencoder: got one, expected None for a model that draws pixels")
        self._scale, self._decode = trained.scale, decode
        self._config = trained.model.config
        self._device = next(trained.model.parameters()).device
        self._sampler = sampler.resolved(trained.scale, self._device)
        dtype = resolve_precision(self._sampler.precision, self._device)
        self._model = optimize_for_inference(trained.model, dtype)
        self._schedule = DiscreteSchedule()

    def __call__(
        self, labels: Tensor, *, first: int = 0, progress: Callable[[int], object] | None = None
    ) -> Tensor:
        """Images of the given classes: int64 `[N]` to uint8 `[N, 3, H, W]` on the CPU.

        Image i starts from noise of its own, drawn on the CPU from the seed and `first + i`. The
        same batch gives the same bits; in batches of another size an image is summed in another
        order, which on a CPU in fp32 changes a pixel by 1 at most. `progress` is called with the
        number of images of each finished batch. Raises ValueError for labels out of range and
        FloatingPointError where what is drawn is not finite.
        """
        if labels.dim() != 1 or labels.dtype != torch.int64:
            raise ValueError(
                f"labels: got {labels.dtype} {tuple(labels.shape)}, expected int64 [N]"
            )
        largest = self._config.num_classes - 1
        outside = labels[(labels < 0) | (labels > largest)]
        if len(outside):
            raise ValueError(f"labels: got {outside[0].item()}, expected 0..{largest}")
        images = []
        # With no labels, one empty batch: it knows the size of an image.
        for y in labels.split(self._sampler.batch_size):
            images.append(self._batch(y, first))
            first += len(y)
            if progress is not None:
                progress(len(y))
        return torch.cat(images)

    @torch.inference_mode()
    def _batch(self, labels: Tensor, first: int) -> Tensor:
        shape = self._config.shape
        noise = torch.empty(len(labels), *shape)
        for i in range(len(labels)):
            generator = torch.Generator().manual_seed(derived_seed(self._sampler.seed, first + i))
            torch.randn(shape, generator=generator, out=noise[i])
        limit = self._sampler.noise_limit
        assert limit is not None
        x = noise.clamp(-limit, limit).to(self._device)
        if len(labels):
            predict = guided(
                self._predict,
                labels.to(self._device),
                self._config.null_class,
                self._sampler.guidance_at_each_time(),
                interval=self._sampler.guidance_interval,
            )
            x = SOLVERS[self._sampler.solver](
                predict,
                x,
                self._schedule,
                self._sampler.steps,
                spacing=self._sampler.spacing,
                clip=self._scale.range,
            )
        if not x.isfinite().all():
            raise FloatingPointError(
                f"images {first}..{first + len(labels) - 1}: not finite in "
                f"{self._sampler.precision}; of these weights, or for want of range"
            )
        if isinstance(self._scale, LatentScale):
            assert self._decode is not None
            return torch.cat(
                [self._decode(z) for z in self._scale.to_latents(x).split(DECODED_TOGETHER)]
            )
        return self._scale.to_pixels(x).cpu()

    def _predict(self, x: Tensor, condition: Tensor, y: Tensor) -> Tensor:
        return self._model(x, log_snr=condition, y=y, last_only=True)[0]


def sample_images(
    trained: TrainedModel,
    labels: Tensor,
    sampler: Sampler,
    *,
    first: int = 0,
    decode: Decode | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Images of the given classes; see `ImageSampler`, which is better for more than one call."""
    return ImageSampler(trained, sampler, decode)(labels, first=first, progress=progress)


def balanced_labels(count: int, num_classes: int) -> Tensor:
    """Labels int64 [count] that hold each class equally often, or once more where it must be.

    They go round the classes, so that the first of them are balanced too; what is left over for an
    incomplete last round is spread evenly. Raises ValueError for numbers below 1.
    """
    if count < 1 or num_classes < 1:
        raise ValueError(f"count, num_classes: got {count}, {num_classes}, expected 1 or more")
    rounds, rest = divmod(count, num_classes)
    return torch.cat(
        [
            torch.arange(num_classes).repeat(rounds),
            torch.arange(rest) * num_classes // max(rest, 1),
        ]
    )
