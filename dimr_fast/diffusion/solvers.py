"""Samplers: from noise to an image along the diffusion's ordinary differential equation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from dimr_fast.diffusion.schedule import DiscreteSchedule

NoiseFn = Callable[[Tensor, Tensor], Tensor]
"""A noise prediction from `x` [B, ...] and the time `t` in (0, 1], 0-d or [B]."""


@dataclass(frozen=True)
class _Stage:
    """One network evaluation, at `time`, and the state it leads to.

    With `x̂0` the image predicted here, the next state is
    `start·(group's first state) + first·(group's first x̂0) + latest·x̂0`.
    """

    time: float
    alpha: float
    sigma: float
    start: float
    first: float
    latest: float


@torch.no_grad()
def dpm_solver_singlestep(
    noise_fn: NoiseFn,
    x: Tensor,
    schedule: DiscreteSchedule,
    steps: int,
    *,
    clip: tuple[float, float] | None = None,
    progress: Callable[[], object] | None = None,
) -> Tensor:
    """Solve from t = 1 to t = 1/1000 with DPM-Solver++ (single-step, order 3), as published.

    Takes exactly `steps` network evaluations, on a grid uniform in time: groups of three, and at
    the end two and one, one, or two of them where `steps` mod 3 is 0, 1 or 2. The coefficients are
    float64 numbers known before the first evaluation, so the loop never waits for the device.

    `noise_fn(x, t)`: the predicted noise, shaped like `x`, at the 0-d time `t` in [1/1000, 1],
    which lies on the CPU, where it can be looked at without waiting; a network whose condition is
    `log_snr` wants `8·t − 4` (`guided` does that). `x`: unit Gaussian noise [B, ...]; the state
    keeps its dtype. `clip`: the range of the data, to which every predicted image is clipped:
    pixels have one, latents (and the published sampler) none. `progress`: called after every
    evaluation. Returns the sample, shaped like `x`; runs without gradients.

    Raises ValueError for `steps` not a whole number of at least 1, for an empty `clip`, for `x`
    not floating point and for a prediction of another shape.

    Source: Lu et al. 2022, arXiv 2211.01095 (clipping: its static thresholding), and arXiv
    2206.00927 for the split into orders.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps: got {steps!r}, expected a whole number of at least 1")
    if clip is not None and not clip[0] < clip[1]:
        raise ValueError(f"clip: got {clip}, expected a lower and a higher number")
    if not x.is_floating_point():
        raise ValueError(f"x: got {x.dtype}, expected a floating-point dtype")
    time_dtype = torch.promote_types(x.dtype, torch.float32)
    for group in _plan(schedule, steps):
        start, first = x, None
        for stage in group:
            t = torch.full((), stage.time, dtype=time_dtype, device="cpu")
            noise = noise_fn(x, t)
            if noise.shape != x.shape:
                raise ValueError(
                    f"noise_fn: returned shape {tuple(noise.shape)}, "
                    f"expected that of x, {tuple(x.shape)}"
                )
            image = (x - stage.sigma * noise.to(x.dtype)) / stage.alpha
            if clip is not None:
                image = image.clamp(*clip)
            first = image if first is None else first
            x = stage.start * start + stage.first * first + stage.latest * image
            if progress is not None:
                progress()
    return x


def _plan(schedule: DiscreteSchedule, steps: int) -> list[list[_Stage]]:
    groups, rest = divmod(steps, 3)
    orders = [3] * groups + [rest] if rest else [3] * (groups - 1) + [2, 1]
    last = 1 / schedule.num_steps
    grid = [1 + (last - 1) * i / steps for i in range(steps)] + [last]
    ends = accumulate(orders, initial=0)
    return [_group(schedule, grid[begin : end + 1]) for begin, end in pairwise(ends)]


def _group(schedule: DiscreteSchedule, times: Sequence[float]) -> list[_Stage]:
    """One solver step of order `len(times) − 1` from the first time to the last.

    With `h` the growth of λ since the first time, the exact solution integrates x̂0 over λ against
    an exponential. Each state takes x̂0 as the line through the group's first and latest
    predictions, whose integral is `α·(1 − e⁻ʰ)` for the constant part and `α·(h − 1 + e⁻ʰ)` for
    the slope. The published inner times are on the time grid, not at thirds of λ.
    """
    order = len(times) - 1
    lambdas = [schedule.half_log_snr(t) for t in times]
    h = [value - lambdas[0] for value in lambdas]
    rates = [schedule.alpha_sigma(t) for t in times]
    stages = []
    for i in range(order):
        alpha, sigma = rates[i + 1]
        constant = -math.expm1(-h[i + 1])
        slope = 0.0
        if i > 0:
            # Order 2 takes h/2·(1 − e⁻ʰ) for the slope's integral: equal to leading order, and
            # what the published samples were drawn with.
            integral = h[i + 1] * constant / 2 if order == 2 else h[i + 1] - constant
            slope = integral / h[i]
        stages.append(
            _Stage(
                time=times[i],
                alpha=rates[i][0],
                sigma=rates[i][1],
                start=sigma / rates[0][1],
                first=alpha * (constant - slope),
                latest=alpha * slope,
            )
        )
    return stages
