"""What a step of training computes: the loss of noise prediction, or of distillation."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dimr_fast.diffusion import (
    Autoguided,
    ConstantGuidance,
    Schedule,
    distillation_loss,
    draw_intervals,
    guided,
    multi_scale_loss,
    teacher_target,
)
from dimr_fast.inference import optimize_for_inference
from dimr_fast.training.teacher import Teacher


class Objective(Protocol):
    """The interface of the objectives.

    `draw(count)` draws what decides the times of a batch, [count], from the global random state.
    `loss` returns the loss per image, [B], of the module `model` in mixed precision: `x0` and
    `noise` are float32 [B, C, H, W], `y` labels [B], and `draws` a part of what `draw` returned.
    """

    def draw(self, count: int) -> Tensor: ...

    def loss(
        self, model: nn.Module, x0: Tensor, y: Tensor, draws: Tensor, noise: Tensor
    ) -> Tensor: ...


@dataclass(frozen=True)
class NoisePrediction:
    """Predict the noise in an image at a random time.

    The published objective draws uniform times and weighs them alike. `half_log_snr` are mean and
    standard deviation of `log(α/σ)` where it is drawn (see `Schedule.draw_normal`). With `min_snr`
    the loss of an image is multiplied by `min(1, min_snr/SNR)`, so that images with little noise
    count less (Hang et al. 2023, arXiv 2303.09556).
    """

    schedule: Schedule
    device: torch.device
    dtype: torch.dtype
    half_log_snr: tuple[float, float] | None = None
    min_snr: float | None = None

    def draw(self, count: int) -> Tensor:
        """Draw times."""
        if self.half_log_snr is None:
            return self.schedule.draw(count, self.device)
        return self.schedule.draw_normal(count, *self.half_log_snr, self.device)

    def loss(self, model: nn.Module, x0: Tensor, y: Tensor, draws: Tensor, noise: Tensor) -> Tensor:
        """Return the multi-scale loss of noise prediction, weighted by `min_snr`."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            predictions = model(
                self.schedule.add_noise(x0, noise, draws),
                log_snr=self.schedule.condition(draws),
                y=y,
            )
        losses = multi_scale_loss(predictions, noise)
        if self.min_snr is None:
            return losses
        weights = (self.min_snr / self.schedule.snr(draws)).clamp(max=1)
        return losses * weights.to(losses.dtype)


class Distillation:
    """Learn to draw in `evaluations` steps what a teacher draws in `teacher_steps`.

    `guidance` is the strength of the teacher's guidance, which the student learns to do without:
    by the teacher's guide, if it has one, otherwise classifier-free. Computation is in `dtype`, the
    student's in mixed precision. See `teacher_target`.
    """

    def __init__(
        self,
        teacher: Teacher,
        schedule: Schedule,
        device: torch.device,
        dtype: torch.dtype,
        *,
        evaluations: int,
        guidance: float,
        teacher_steps: int,
    ) -> None:
        self.schedule, self.device, self.dtype = schedule, device, dtype
        self.evaluations, self.teacher_steps = evaluations, teacher_steps
        self.null_class = teacher.trained.model.config.null_class
        self.range = teacher.trained.scale.range
        network = optimize_for_inference(teacher.trained.model.to(device), dtype)
        self.network: nn.Module = network
        self.guidance = ConstantGuidance(guidance)
        if teacher.guide is not None:
            guide = optimize_for_inference(teacher.guide.model.to(device), dtype)
            self.network = Autoguided(network, guide, guidance)
            self.guidance = ConstantGuidance(0.0)

    def draw(self, count: int) -> Tensor:
        """Draw numbers uniform in [0, 1), on the CPU, where coefficients are computed."""
        return torch.rand(count, dtype=torch.float64, device="cpu")

    def loss(self, model: nn.Module, x0: Tensor, y: Tensor, draws: Tensor, noise: Tensor) -> Tensor:
        """Return the distillation loss."""
        intervals = draw_intervals(
            self.schedule, draws.tolist(), self.evaluations, self.teacher_steps, self.device
        )
        teacher = guided(
            self._predict, y, self.null_class, self.guidance, condition=self.schedule.condition_at
        )
        x = intervals.start(x0, noise)
        target = teacher_target(x, intervals, teacher, self.range)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            condition = self.schedule.condition_at(intervals.time[0])
            predictions = model(x, log_snr=condition, y=y)
        return distillation_loss(predictions, target, intervals)

    def _predict(self, x: Tensor, condition: Tensor, y: Tensor) -> Tensor:
        return self.network(x, log_snr=condition, y=y, last_only=True)[0]
