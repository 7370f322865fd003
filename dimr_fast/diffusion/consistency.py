"""Consistency distillation: what a student learns, to sample in few steps as its teacher does."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dimr_fast.diffusion.loss import multi_scale_loss
from dimr_fast.diffusion.schedule import Schedule
from dimr_fast.diffusion.solvers import NoiseFn, time_grid
from dimr_fast.utils.validation import require

HUBER = 0.01
"""Error at which `consistency_loss` changes from square to linear, on the scale of images."""


@dataclass(frozen=True)
class DDIMSteps:
    """One DDIM step for each image of a batch, each between times of its own.

    The next state is `keep·x + noise·ε`; `keep` and `noise` are float32 [B].
    """

    keep: Tensor
    noise: Tensor

    def __call__(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return the states [B, ...] after the step with the predicted noise."""
        return _per_image(self.keep, x) * x + _per_image(self.noise, x) * noise

    def noise_between(self, x: Tensor, end: Tensor) -> Tensor:
        """Return the noise that takes `x` to `end`: the inverse of a call."""
        return (end - _per_image(self.keep, x) * x) / _per_image(self.noise, x)


@dataclass(frozen=True)
class ConsistencyTimes:
    """Times of a batch of images, and the DDIM steps between them.

    Each image has a time, a nearer one (one step of the teacher closer to the image) and the end of
    its interval. `time`, `nearer`: float32 [B]; `alpha`, `sigma`: factors of image and noise at
    `time`. `teacher` steps from the time to the nearer one, `rest` from there to the end, `whole`
    from the time to the end. `reaches_end`: bool [B], whether the nearer time is the end.
    """

    time: Tensor
    nearer: Tensor
    alpha: Tensor
    sigma: Tensor
    teacher: DDIMSteps
    rest: DDIMSteps
    whole: DDIMSteps
    reaches_end: Tensor

    def noisy(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Return the noisy inputs at `time`, `α·x0 + σ·noise`; [B, ...] each."""
        return _per_image(self.alpha, x0) * x0 + _per_image(self.sigma, x0) * noise


def consistency_times(
    schedule: Schedule,
    draws: Sequence[float],
    evaluations: int,
    teacher_steps: int,
    device: torch.device | str = "cpu",
) -> ConsistencyTimes:
    """Return the times of a batch, one image for each number in `draws`, uniform in [0, 1).

    Times are uniform in (min_time, 1], which is cut into `evaluations` equal intervals: the grid of
    a solver with spacing "time". A step of the teacher is 1/`teacher_steps` of the schedule's range
    of `λ = log(α/σ)`, or less where the interval ends. Raises ValueError for a draw outside [0, 1)
    and for numbers of steps below 1.
    """
    require(evaluations >= 1, "evaluations", evaluations, "1 or more")
    require(teacher_steps >= 1, "teacher_steps", teacher_steps, "1 or more")
    outside = [draw for draw in draws if not 0 <= draw < 1]
    require(not outside, "draws", outside[:1], "numbers in 0 <= u < 1")
    grid = time_grid(schedule, evaluations)[::-1]
    first, last = schedule.half_log_snr(1.0), schedule.half_log_snr(schedule.min_time)
    length = (last - first) / teacher_steps
    times = [1 - draw * (1 - schedule.min_time) for draw in draws]
    ends = [grid[max(bisect_left(grid, time) - 1, 0)] for time in times]
    nearer = [
        max(schedule.time_at(schedule.half_log_snr(time) + length), end)
        for time, end in zip(times, ends, strict=True)
    ]
    # In float64: differences of factors of close times would lose digits.
    rates = torch.tensor(
        [[schedule.alpha_sigma(t) for t in at] for at in (times, nearer, ends)],
        dtype=torch.float64,
    )
    alpha, sigma = rates.unbind(-1)
    (begin, end) = ([0, 1, 0], [1, 2, 2])  # of the teacher's step, the rest and the whole
    keep = alpha[end] / alpha[begin]
    noise = sigma[end] - keep * sigma[begin]
    reaches_end = [at == end for at, end in zip(nearer, ends, strict=True)]
    rows = [
        torch.tensor([times, nearer, reaches_end], dtype=torch.float64),
        rates[0].T,
        keep,
        noise,
    ]
    # One copy to the device.
    time, near, reaches, alpha, sigma, *factors = torch.cat(rows).float().to(device)
    teacher, rest, whole = map(DDIMSteps, factors[:3], factors[3:])
    return ConsistencyTimes(time, near, alpha, sigma, teacher, rest, whole, reaches.bool())


@torch.no_grad()
def consistency_target(
    x: Tensor, times: ConsistencyTimes, teacher: NoiseFn, student: NoiseFn
) -> Tensor:
    """Return the noise that the student should predict for `x` at `times.time`.

    The teacher takes `x` one step nearer to the image, and the student from there to the end of the
    interval; one DDIM step with the target leads to the same place. A student that has learned this
    everywhere samples in one DDIM step per interval what the teacher samples in all of its steps.
    It predicts noise as its teacher does, and near the end of an interval the target is the
    teacher's prediction, so the student starts from the teacher's weights.

    `x`: [B, ...] at `times.time`, floating point. `teacher` and `student` take states and times
    [B]. Returns the shape and dtype of `x`.

    Source: Heek, Hoogeboom and Salimans 2024, arXiv 2403.06807 (multistep consistency
    distillation), here for a network that predicts noise; Song et al. 2023, arXiv 2303.01469.
    """
    taught = teacher(x, times.time)
    nearer = times.teacher(x, taught)
    end = times.rest(nearer, student(nearer, times.nearer))
    # Where the interval ends, both steps are the teacher's, and the quotient would lose digits.
    return torch.where(
        _per_image(times.reaches_end, x), taught, times.whole.noise_between(x, end).to(x.dtype)
    )


def consistency_loss(
    predictions: Sequence[Tensor], target: Tensor, times: ConsistencyTimes
) -> Tensor:
    """Return the error of the student's predictions per image, [B], on the scale of images.

    An error of the noise moves the end of the interval by the factor `times.whole.noise`, which is
    large at high noise; the pseudo-Huber function keeps these images from dominating a batch. At
    every resolution the target is the pooled `target`, as in `multi_scale_loss`.

    `predictions`: as the model returns them. `target`: [B, C, H, W].

    Source of the pseudo-Huber loss: Song and Dhariwal 2023, arXiv 2310.14189.
    """
    squared = multi_scale_loss(predictions, target) * times.whole.noise.square()
    return (squared + HUBER**2).sqrt() - HUBER


def _per_image(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 1))
