"""Distillation: what a student learns, to draw in few steps as its teacher does in many."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dimr_fast.diffusion.loss import multi_scale_loss
from dimr_fast.diffusion.schedule import Schedule
from dimr_fast.diffusion.solvers import NoiseFn, time_grid
from dimr_fast.utils.validation import require

ORDER_1_AT_THE_END = 15
"""With fewer steps, `dpm_solver_multistep` makes the last one with order 1."""
HUBER = 0.01
"""Error at which `distillation_loss` changes from square to linear, on the scale of images."""


@dataclass(frozen=True)
class Intervals:
    """The interval of each image of a batch: the teacher's times in it, from noise to image.

    `time`, `alpha`, `sigma`: float32 [steps + 1, B], the times and the factors of image and noise
    there; the first row is the start of the interval, the last its end. `step`: the increase of
    `λ = log(α/σ)` in every step of the teacher. `slope`: float32 [steps, B], the weight of the
    difference from the prediction before. The student makes one DDIM step from start to end:
    `keep·x + noise·ε` with its prediction ε; `keep` and `noise` are float32 [B].
    """

    time: Tensor
    alpha: Tensor
    sigma: Tensor
    step: float
    slope: Tensor
    keep: Tensor
    noise: Tensor

    def start(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Return the noisy inputs where the intervals start, `α·x0 + σ·noise`; [B, ...] each."""
        return _per_image(self.alpha[0], x0) * x0 + _per_image(self.sigma[0], x0) * noise

    def noise_to(self, end: Tensor, x: Tensor) -> Tensor:
        """Return the noise with which the student's step leads from `x` to `end`; [B, ...]."""
        return (end - _per_image(self.keep, x) * x) / _per_image(self.noise, x)


def draw_intervals(
    schedule: Schedule,
    draws: Sequence[float],
    evaluations: int,
    teacher_steps: int,
    device: torch.device | str = "cpu",
) -> Intervals:
    """Return the interval of each image, one for each number in `draws`, uniform in [0, 1).

    The steps of the teacher are equal in λ, the grid of a solver with spacing "log_snr"; each of
    the `evaluations` intervals has `teacher_steps/evaluations` of them. Raises ValueError for a
    draw outside [0, 1), for no evaluation, and for teacher_steps that are no multiple of it.
    """
    require(evaluations >= 1, "evaluations", evaluations, "1 or more")
    require(
        teacher_steps >= 1 and teacher_steps % evaluations == 0,
        "teacher_steps",
        teacher_steps,
        f"a multiple of evaluations, {evaluations}",
    )
    outside = [draw for draw in draws if not 0 <= draw < 1]
    require(not outside, "draws", outside[:1], "numbers in 0 <= u < 1")
    grid = time_grid(schedule, teacher_steps, "log_snr")
    steps = teacher_steps // evaluations
    first = [int(draw * evaluations) * steps for draw in draws]
    slope = torch.full((steps, len(first)), 0.5, dtype=torch.float64)
    slope[0] = 0  # no prediction before
    if teacher_steps < ORDER_1_AT_THE_END:
        slope[-1, [i + steps == teacher_steps for i in first]] = 0
    # In float64: differences of factors of close times would lose digits.
    rows = torch.tensor(
        [[(time, *schedule.alpha_sigma(time)) for time in grid[i : i + steps + 1]] for i in first],
        dtype=torch.float64,
    ).permute(2, 1, 0)
    _, alpha, sigma = rows
    keep = alpha[-1] / alpha[0]
    noise = sigma[-1] - keep * sigma[0]
    length = schedule.half_log_snr(schedule.min_time) - schedule.half_log_snr(1.0)
    # One copy to the device.
    values = torch.cat([*rows, slope, keep[None], noise[None]]).float().to(device)
    time, alpha, sigma, slope, keep, noise = values.split([steps + 1] * 3 + [steps, 1, 1])
    return Intervals(time, alpha, sigma, length / teacher_steps, slope, keep[0], noise[0])


@torch.no_grad()
def teacher_target(
    x: Tensor,
    intervals: Intervals,
    teacher: NoiseFn,
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """Return the noise that the student should predict for `x` at the start of its intervals.

    The teacher goes from there to the end in all its steps, by the solver "dpm++2m"; one DDIM step
    with the target leads to the same place. So a student that has learned this draws in one step
    per interval what its teacher draws in all. It predicts noise as the teacher does, and is
    evaluated at these times alone.

    `x`: [B, ...], floating point. `teacher` takes states and times [B]. `clip`: range to which the
    teacher's predicted images are clipped. Returns the shape and dtype of `x`.

    Source: Luhman and Luhman 2021, arXiv 2101.02388 (one interval, DDIM); the solver is that of
    Lu et al. 2022, arXiv 2211.01095, algorithm 2.
    """
    state = before = x
    change = math.expm1(-intervals.step)
    for i in range(len(intervals.time) - 1):
        alpha, sigma, next_alpha, next_sigma = (
            _per_image(values, x)
            for values in (
                intervals.alpha[i],
                intervals.sigma[i],
                intervals.alpha[i + 1],
                intervals.sigma[i + 1],
            )
        )
        image = (state - sigma * teacher(state.to(x.dtype), intervals.time[i])) / alpha
        if clip is not None:
            image = image.clamp(*clip)
        slope = _per_image(intervals.slope[i], x)
        line = image + slope * (image - before)
        state = next_sigma / sigma * state - next_alpha * change * line
        before = image
    return intervals.noise_to(state, x).to(x.dtype)


def distillation_loss(
    predictions: Sequence[Tensor], target: Tensor, intervals: Intervals
) -> Tensor:
    """Return the error of the student's predictions per image, [B], on the scale of images.

    An error of the noise moves the end of the interval by the factor `intervals.noise`, which is
    large at high noise; the pseudo-Huber function keeps these images from dominating a batch. At
    every resolution the target is the pooled `target`, as in `multi_scale_loss`.

    `predictions`: as the model returns them. `target`: [B, C, H, W].

    Source of the pseudo-Huber loss: Song and Dhariwal 2023, arXiv 2310.14189.
    """
    squared = multi_scale_loss(predictions, target) * intervals.noise.square()
    return (squared + HUBER**2).sqrt() - HUBER


def _per_image(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 1))
