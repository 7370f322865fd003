"""Settings of sampling, and drawing images from a trained model in memory."""

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from dimr_fast.checkpoint import TrainedModel
from dimr_fast.data.autoencoder import Decode
from dimr_fast.data.scaling import LatentScale
from dimr_fast.diffusion import (
    SOLVERS,
    ConstantGuidance,
    Guidance,
    NoiseFn,
    PowerCosineGuidance,
    Solver,
    SolverName,
    Spacing,
    euler_maruyama,
    guided,
    noise_schedule,
)
from dimr_fast.inference import Quantization, optimize_for_inference
from dimr_fast.utils.device import Precision, precision_name, resolve_precision
from dimr_fast.utils.seeds import derived_seed
from dimr_fast.utils.validation import check_seed, check_tensors, require, require_fields

DECODER_BATCH_SIZE = 8
"""Latents in one call of the autoencoder, whose activations are far larger than the model's."""

Watch = Callable[[int, Callable[[], Tensor]], object]
"""A function that is called after every network evaluation with its number in the batch, from 1,
and a function that returns the images predicted there, uint8 `[n, 3, H, W]`. They are computed only
if that function is called, during the call of `Watch`."""

_SOLVER_NAMES: dict[SolverName, str] = {
    "dpm++": "DPM-Solver++ single-step, order 3",
    "dpm++2m": "DPM-Solver++ multistep, order 2",
    "dpm++3m": "DPM-Solver++ multistep, order 3",
    "ddim": "DDIM, eta 0",
    "heun": "Heun, order 2",
    "euler": "Euler, order 1",
    "euler-maruyama": "Euler-Maruyama, reverse SDE",
}
_PUBLISHED_SOLVER: dict[str, Any] = {"solver": "dpm++", "spacing": "time"}


SamplingPrecision = Literal[Precision, Quantization]
"""Precision of the model: that of `optimize_for_inference`, or a format that it quantises to."""


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Settings of sampling. Times t run from 1, pure noise, to nearly 0.

    `resolved` decides the settings that are None for a model.
    """

    defaults: Literal["published"] | None = None
    """Values of the settings that are None. published: solver dpm++, spacing time, 250 steps,
    guidance 0.4 (0 for a model of the schedule vp-sde, whose labels were never dropped), no
    clipping and no limit, as for the published scores. None: those that the model remembers, as a
    converted or distilled one does. Otherwise, for pixels: dpm++2m, spacing log_snr, 8 steps,
    guidance 0, clipping and a limit of 2.5; for latents: dpm++, spacing time, 25 steps, guidance
    1."""
    solver: SolverName | None = None
    """dpm++ is the published solver, single-step DPM-Solver++ of order 3; dpm++2m and dpm++3m are
    its multistep variants. euler and the stochastic euler-maruyama are those of the published code
    for pixels. A distilled model is sampled by ddim alone. None: see defaults."""
    steps: int | None = None
    """Network evaluations per image, for every solver. None: see defaults."""
    spacing: Spacing | None = None
    """Solver times are uniform in `time`, as published, or in `log_snr`. None: see defaults."""
    guidance: float | None = None
    """Classifier-free guidance s: ε = ε_c + s·(ε_c − ε_u), where ε_c is conditional and ε_u
    unconditional. 0 disables it, -1 draws images without class; a guidance scale of 1.4 in other
    libraries is 0.4 here. None: see defaults."""
    guidance_power: float | None = None
    """Power p of the schedule s·½(1 − cos(π·(1 − t)^p)), which rises from 0 at t = 1 to s at
    t = 0. None: constant guidance."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guidance is applied for times in [low, high], a part of [0, 1]. Outside it the unconditional
    half of the batch is skipped."""
    noise_limit: float | None = None
    """Initial noise is clamped to ± this value: a briefly trained model underestimates larger
    noise, which then remains as bright dots. inf: no limit. None: see defaults."""
    clip: bool | None = None
    """Clip each predicted image to the range of pixels; latents have none. None: see defaults."""
    batch_size: int = 64
    precision: SamplingPrecision = "auto"
    """int8 (on a CPU) and fp8 (on GPUs of compute capability 8.9 or later) quantise a model in
    bf16: faster and less accurate."""
    seed: int = 0
    """Image i starts from its own noise, drawn from this seed and i."""

    def validate(self) -> None:
        """Raise ValueError naming a setting that is out of range."""
        power, interval = self.guidance_power, self.guidance_interval
        least = -1 if power is None else 0
        require_fields(
            self,
            solver=(self.solver is None or self.solver in SOLVERS, f"one of {', '.join(SOLVERS)}"),
            defaults=(self.defaults in (None, "published"), "published or None"),
            steps=(self.steps is None or self.steps > 0, "1 or more, or None"),
            spacing=(self.spacing in ("time", "log_snr", None), "time or log_snr, or None"),
            guidance=(
                self.guidance is None or least <= self.guidance < math.inf,
                "a finite number, -1 (without class) or more"
                if power is None
                else "a finite number, 0 or more with guidance_power",
            ),
            guidance_power=(power is None or 0 < power < math.inf, "a positive number, or None"),
            guidance_interval=(
                0 <= interval[0] <= interval[1] <= 1,
                "(low, high) with 0 <= low <= high <= 1",
            ),
            noise_limit=(self.noise_limit is None or self.noise_limit > 0, "a positive number"),
            batch_size=(self.batch_size > 0, "1 or more"),
            precision=(
                self.precision in get_args(SamplingPrecision),
                f"one of {', '.join(get_args(SamplingPrecision))}",
            ),
            seed=check_seed(self.seed),
        )

    @property
    def quantization(self) -> Quantization | None:
        """The format that `precision` quantises the model to, None for an ordinary dtype."""
        quantized = self.precision in get_args(Quantization)
        return cast(Quantization, self.precision) if quantized else None

    def resolved(self, trained: TrainedModel, device: torch.device) -> "SamplerConfig":
        """Return a copy in which no setting is None and the precision is decided.

        `guidance_power` stays None for constant guidance. Raises ValueError for `clip` with a model
        of latents, for power or interval of a guidance that is 0 by default, and for a distilled
        model and settings it was not distilled for.
        """
        latents = isinstance(trained.scale, LatentScale)
        require(not (latents and self.clip), "clip", self.clip, "False or None: latents have none")
        published = (self.defaults or trained.defaults) == "published"
        values: dict[str, Any] = {"noise_limit": math.inf, "clip": False}
        if published:
            dropped = trained.schedule == "discrete"
            values |= _PUBLISHED_SOLVER | {"steps": 250, "guidance": 0.4 if dropped else 0.0}
        elif latents:
            values |= _PUBLISHED_SOLVER | {"steps": 25, "guidance": 1.0}
        else:
            # Few evaluations cost the packaged model almost nothing: benchmarks/RESULTS.md.
            values |= {"solver": "dpm++2m", "spacing": "log_snr", "steps": 8, "guidance": 0.0}
            values |= {"noise_limit": 2.5, "clip": True}
        if trained.evaluations is not None:
            values |= self._of_distilled(trained.evaluations)
        limits_guidance = self.guidance_power is not None or self.guidance_interval != (0.0, 1.0)
        require(
            self.guidance is not None or values["guidance"] != 0 or not limits_guidance,
            "guidance",
            None,
            "a number with guidance_power or guidance_interval: by default this model is drawn "
            "without guidance",
        )
        changes = {name: value for name, value in values.items() if getattr(self, name) is None}
        precision = self.precision
        if self.quantization is None:
            precision = precision_name(resolve_precision(cast(Precision, precision), device))
        return dataclasses.replace(self, precision=precision, **changes)

    def _of_distilled(self, evaluations: int) -> dict[str, Any]:
        """Return the settings of a model that was distilled for `evaluations` DDIM steps.

        Raises ValueError where a setting is another one.
        """
        fixed = {"solver": "ddim", "spacing": "log_snr", "steps": evaluations, "guidance": 0.0}
        for name, value in {**fixed, "defaults": None}.items():
            given = getattr(self, name)
            require(
                given in (None, value),
                name,
                given,
                f"{value}: the model was distilled for {evaluations} evaluations without guidance",
            )
        return {**fixed, "clip": False}

    def recipe(self, trained: TrainedModel, device: torch.device) -> dict[str, Any]:
        """Return all settings that a score of the images must state, as JSON values."""
        resolved = self.resolved(trained, device)
        values = dataclasses.asdict(resolved)
        del values["defaults"]  # it only fills in others
        return {
            **values,
            "solver": _SOLVER_NAMES[cast(SolverName, resolved.solver)],
            "guidance_interval": list(self.guidance_interval),
            "noise_limit": resolved.noise_limit if resolved.noise_limit != math.inf else "none",
            "clip": "each predicted image, to the pixels' range" if resolved.clip else "none",
            "schedule": trained.schedule,
            "start": "noise of its own for each image, from seed and index",
        }

    def guidance_schedule(self) -> Guidance:
        """Return the guidance at each time, for `diffusion.guided`.

        Raises ValueError where `guidance` is None.
        """
        if self.guidance is None:
            raise ValueError("guidance: got None, expected a number; see resolved")
        if self.guidance_power is None:
            return ConstantGuidance(self.guidance)
        return PowerCosineGuidance(self.guidance + 1, self.guidance_power)


Sampler = SamplerConfig
"""Earlier name of `SamplerConfig`."""


class ImageSampler:
    """Draw images from one model, optimised for inference.

    Construction copies and packs the weights, and on a GPU the first batch of each size captures a
    CUDA graph: construct it once for many calls. `network` is the optimised model. Images are drawn
    on the device of `trained.model`; later changes to that model have no effect. `decode` turns the
    latents of a latent model into pixels. Raises ValueError for settings out of range, and where
    `decode` is missing for a latent model or given for a pixel model.
    """

    def __init__(
        self, trained: TrainedModel, sampler: SamplerConfig, decode: Decode | None = None
    ) -> None:
        sampler.validate()
        if isinstance(trained.scale, LatentScale) and decode is None:
            raise ValueError(
                "autoencoder: got None, expected one to decode the latents that this model draws"
            )
        if not isinstance(trained.scale, LatentScale) and decode is not None:
            raise ValueError("autoencoder: got one, expected None for a model that draws pixels")
        self._scale, self._decode = trained.scale, decode
        self._config = trained.model.config
        self._device = next(trained.model.parameters()).device
        self._sampler = sampler.resolved(trained, self._device)
        quantize = self._sampler.quantization
        if quantize is None:
            dtype = resolve_precision(cast(Precision, self._sampler.precision), self._device)
        else:
            dtype = torch.bfloat16
        self.network = optimize_for_inference(trained.model, dtype, quantize=quantize)
        self._schedule = noise_schedule(trained.schedule)
        self._trained = trained

    @property
    def settings(self) -> SamplerConfig:
        """The resolved settings."""
        return self._sampler

    def with_settings(self, sampler: SamplerConfig) -> "ImageSampler":
        """Return a sampler of the same model with other settings; both share `network`.

        Raises ValueError for settings out of range and for another precision.
        """
        sampler.validate()
        resolved = sampler.resolved(self._trained, self._device)
        require(
            resolved.precision == self._sampler.precision,
            "precision",
            resolved.precision,
            f"{self._sampler.precision}, that of the network",
        )
        other = copy.copy(self)
        other._sampler = resolved
        return other

    def __call__(
        self,
        labels: Tensor,
        *,
        first: int = 0,
        progress: Callable[[int], object] | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Draw one image for each label: int64 `[N]` to uint8 `[N, 3, H, W]` on the CPU.

        Image i starts from its own noise, drawn on the CPU from the seed and `first + i`. The same
        batch gives the same bits; in another batch size sums are computed in another order, which
        on a CPU in fp32 changes a pixel by 1 at most. `progress` is called with the number of
        images of each finished batch; `watch` sees the images while they form. Raises ValueError
        for labels out of range and FloatingPointError for images that are not finite.
        """
        check_tensors(labels=labels)
        if labels.dim() != 1 or labels.dtype != torch.int64:
            raise ValueError(
                f"labels: got {labels.dtype} {tuple(labels.shape)}, expected int64 [N]"
            )
        largest = self._config.num_classes - 1
        outside = labels[(labels < 0) | (labels > largest)]
        if len(outside):
            raise ValueError(f"labels: got {outside[0].item()}, expected 0..{largest}")
        images = []
        # Without labels there is one empty batch, which has the size of an image.
        for y in labels.split(self._sampler.batch_size):
            images.append(self._batch(y, first, watch))
            first += len(y)
            if progress is not None:
                progress(len(y))
        return torch.cat(images)

    @torch.inference_mode()
    def _batch(self, labels: Tensor, first: int, watch: Watch | None) -> Tensor:
        shape = self._config.shape
        seeds = [derived_seed(self._sampler.seed, first + i) for i in range(len(labels))]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def draw() -> Tensor:
            noise = torch.empty(len(labels), *shape, dtype=torch.float32)
            for image, generator in zip(noise, generators, strict=True):
                torch.randn(shape, generator=generator, out=image)
            return noise

        settings = self._sampler
        assert settings.noise_limit is not None
        assert settings.steps is not None
        assert settings.solver is not None
        assert settings.spacing is not None
        x = draw().clamp(-settings.noise_limit, settings.noise_limit).to(self._device)
        if len(labels):
            null, guidance = self._config.null_class, settings.guidance_schedule()
            if (labels == null).all():
                guidance = ConstantGuidance(0)  # would change nothing and cost a second evaluation
            predict = guided(
                self._predict,
                labels.to(self._device),
                null,
                guidance,
                interval=settings.guidance_interval,
                condition=self._schedule.condition_at,
            )
            if watch is not None:
                predict = self._watched(predict, watch)
            solve: Solver = SOLVERS[settings.solver]
            if solve is euler_maruyama:
                # Its noise, too, comes from the seed and index of each image.
                solve = partial(euler_maruyama, draw=lambda: draw().to(self._device))
            x = solve(
                predict,
                x,
                self._schedule,
                settings.steps,
                spacing=settings.spacing,
                clip=self._clip,
            )
        if not x.isfinite().all():
            raise FloatingPointError(
                f"images {first}..{first + len(labels) - 1}: not finite in "
                f"{self._sampler.precision}: the weights are not finite, or the range is too small"
            )
        return self._to_pixels(x)

    @property
    def _clip(self) -> tuple[float, float] | None:
        return self._scale.range if self._sampler.clip else None

    def _to_pixels(self, x: Tensor) -> Tensor:
        if isinstance(self._scale, LatentScale):
            assert self._decode is not None
            return torch.cat(
                [self._decode(z) for z in self._scale.to_latents(x).split(DECODER_BATCH_SIZE)]
            )
        return self._scale.to_pixels(x).cpu()

    def _watched(self, predict: NoiseFn, watch: Watch) -> NoiseFn:
        """Return `predict` that also shows `watch` the image predicted in each evaluation."""
        evaluations = count(1)

        def predict_and_show(x: Tensor, t: Tensor) -> Tensor:
            noise = predict(x, t)

            def images() -> Tensor:
                alpha, sigma = self._schedule.alpha_sigma(t.item())
                image = (x - sigma * noise) / alpha
                return self._to_pixels(image if self._clip is None else image.clamp(*self._clip))

            watch(next(evaluations), images)
            return noise

        return predict_and_show

    def _predict(self, x: Tensor, condition: Tensor, y: Tensor) -> Tensor:
        return self.network(x, log_snr=condition, y=y, last_only=True)[0]


def sample_images(
    trained: TrainedModel,
    labels: Tensor,
    sampler: SamplerConfig,
    *,
    first: int = 0,
    decode: Decode | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Draw images of the given classes; for more than one call, `ImageSampler` is faster."""
    return ImageSampler(trained, sampler, decode)(labels, first=first, progress=progress)


def balanced_labels(count: int, num_classes: int) -> Tensor:
    """Return labels int64 [count] in which class counts differ by at most one.

    Labels cycle through the classes, so that every prefix is nearly balanced; the classes of an
    incomplete last cycle are evenly spaced. Raises ValueError for numbers below 1.
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
