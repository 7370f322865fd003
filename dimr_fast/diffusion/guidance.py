"""Guidance: lead a prediction away from the unconditional one, or from that of a worse model."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dimr_fast.diffusion.schedule import time_condition
from dimr_fast.diffusion.solvers import NoiseFn
from dimr_fast.utils.validation import check_tensors, require

ModelFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function that predicts noise from `x` [N, ...], the condition (`log_snr`, [1] or [N]) and
labels [N]."""


@dataclass(frozen=True)
class ConstantGuidance:
    """Apply the same guidance at every time: `ε = ε_c + scale·(ε_c − ε_u)`. Published scale: 0.4.

    A scale of 0 means no guidance, −1 the unconditional prediction. Raises ValueError unless
    `scale` is finite and at least −1.

    Source: Ho and Salimans 2022, arXiv 2207.12598, equation 6.
    """

    scale: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= -1):
            raise ValueError(f"scale: got {self.scale}, expected a finite number of at least -1")

    @property
    def off(self) -> bool:
        """True where guidance never changes the prediction."""
        return self.scale == 0

    @property
    def unconditional(self) -> bool:
        """True where the result is the unconditional prediction alone."""
        return self.scale == -1

    def extra(self, t: Tensor) -> Tensor:
        """Return the factor of `ε_c − ε_u` that is added to `ε_c` at time `t`; shape of `t`."""
        return torch.full_like(t, self.scale)


@dataclass(frozen=True)
class PowerCosineGuidance:
    """Increase guidance as the noise decreases: `ε = ε_u + w·(ε_c − ε_u)`.

    `w = (peak − 1)·½(1 − cos(π·(1 − t)^power)) + 1`: `w` is 1 (no guidance) at t = 1 and `peak` at
    t = 0. A larger `power` keeps `w` near 1 for more of the early steps.

    Raises ValueError unless `peak` is finite and at least 1 (1 means no guidance) and `power` is
    finite and positive.

    Source: Gao et al. 2023, arXiv 2303.14389.
    """

    peak: float
    power: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.peak) and self.peak >= 1):
            raise ValueError(f"peak: got {self.peak}, expected a finite number of at least 1")
        if not (math.isfinite(self.power) and self.power > 0):
            raise ValueError(f"power: got {self.power}, expected a finite number above 0")

    @property
    def off(self) -> bool:
        """True where guidance never changes the prediction."""
        return self.peak == 1

    @property
    def unconditional(self) -> bool:
        """False: the result is the conditional prediction at t = 1."""
        return False

    def extra(self, t: Tensor) -> Tensor:
        """Return the factor of `ε_c − ε_u` that is added to `ε_c` at time `t`; shape of `t`."""
        return (self.peak - 1) * 0.5 * (1 - torch.cos(math.pi * (1 - t) ** self.power))


Guidance = ConstantGuidance | PowerCosineGuidance


def guided(
    model_fn: ModelFn,
    y: Tensor,
    null_label: int,
    guidance: Guidance,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    condition: Callable[[Tensor], Tensor] = time_condition,
) -> NoiseFn:
    """Return the guided noise prediction of a class-conditional model, for a solver.

    Each call of the result calls `model_fn` once, with a batch of 2B: the images with their labels,
    then the same images with the null label. If guidance is off or unconditional, or the time is
    outside `interval`, the batch has only the B images. The condition of `model_fn` is that of the
    schedule the model was trained with, `schedule.condition_at`; by default that of
    `DiscreteSchedule`, `8·t − 4`. It has the shape [1] if `t` is 0-d, otherwise one entry per row
    of the batch.

    `y`: integer labels [B]. `null_label`: the label of the unconditional prediction. The result
    takes `x` [B, ...] and `t` (0-d or [B]) and returns the shape and dtype of `x`; guidance is
    computed in that dtype, also if the model predicts in a lower one. `interval`: guidance is
    applied for times in [low, high], which lies in [0, 1]. If that is only a part, `t` must be 0-d
    and on the CPU, as solvers pass it: the host must choose the batch without waiting for the
    device.

    Raises ValueError for a wrong shape or dtype of `y` and for another interval. The returned
    function raises ValueError for a wrong shape of `x`, of `t` or of the prediction.

    Source of the interval: Kynkäänniemi et al. 2024, arXiv 2404.07724.
    """
    check_tensors(y=y)
    if y.ndim != 1 or y.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"y: got {y.dtype} {tuple(y.shape)}, expected int32 or int64 labels [B]")
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"interval: got {interval}, expected (low, high), 0 <= low <= high <= 1")
    always = (low, high) == (0, 1)
    without_class = torch.full_like(y, null_label)
    labels = torch.cat([y, without_class])

    def noise_fn(x: Tensor, t: Tensor) -> Tensor:
        if x.shape[:1] != y.shape:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected [{y.shape[0]}, ...] as y")
        if t.ndim != 0 and t.shape != y.shape:
            raise ValueError(
                f"t: got shape {tuple(t.shape)}, expected one time or one per image, {y.shape[0]}"
            )
        if not always and (t.ndim != 0 or t.device.type != "cpu"):
            raise ValueError(
                f"t: got shape {tuple(t.shape)} on {t.device}, expected one time on the CPU for "
                f"guidance in the interval {interval}"
            )
        inside = always or low <= t.item() <= high
        t = t.to(x.device, non_blocking=True)
        log_snr = condition(t.reshape(-1))
        if guidance.off or not inside:
            return _predict(model_fn, x, log_snr, y)
        if guidance.unconditional:
            return _predict(model_fn, x, log_snr, without_class)
        both = log_snr if t.ndim == 0 else torch.cat([log_snr, log_snr])
        conditional, null = _predict(model_fn, torch.cat([x, x]), both, labels).chunk(2)
        extra = guidance.extra(t).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return conditional + extra * (conditional - null)

    return noise_fn


class Autoguided(nn.Module):
    """Predict noise by a network, led away from the prediction of a worse one.

    `ε = ε_main + strength·(ε_main − ε_guide)`, for each prediction of a list, with the same inputs.
    `main` and `guide` are called alike and return lists of the same shapes, as `DiMR` does; `guide`
    is for instance an earlier average of the weights of `main`. Raises ValueError unless `strength`
    is finite and at least −1.

    Source: Karras et al. 2024, arXiv 2406.02507.
    """

    def __init__(self, main: nn.Module, guide: nn.Module, strength: float) -> None:
        super().__init__()
        require(-1 <= strength < math.inf, "strength", strength, "a finite number of at least -1")
        self.main, self.guide, self.strength = main, guide, strength

    def forward(self, x: Tensor, **arguments: Any) -> list[Tensor]:
        """Return the guided predictions; the arguments are those of both networks."""
        pairs = zip(self.main(x, **arguments), self.guide(x, **arguments), strict=True)
        return [main + self.strength * (main - guide) for main, guide in pairs]


def _predict(model_fn: ModelFn, x: Tensor, condition: Tensor, y: Tensor) -> Tensor:
    noise = model_fn(x, condition, y)
    if noise.shape != x.shape:
        raise ValueError(
            f"model_fn: returned shape {tuple(noise.shape)}, expected that of x, {tuple(x.shape)}"
        )
    return noise.to(x.dtype)
