"""Solvers of the probability-flow ODE, and of the reverse SDE, from noise to an image."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from dimr_fast.diffusion.schedule import Schedule
from dimr_fast.utils.validation import check_tensors

NoiseFn = Callable[[Tensor, Tensor], Tensor]
"""A function that predicts noise from `x` [B, ...] and the time `t` in (0, 1], 0-d or [B]."""

Spacing = Literal["time", "log_snr"]
"""Grid of a solver's times: uniform in time, as published, or in `λ = log(α/σ)`."""


class Solver(Protocol):
    """The interface of `SOLVERS`: integrate from noise at t = 1 to a sample at the schedule's end.

    The end is `schedule.min_time`, 1/1000 for `DiscreteSchedule` and 1/10,000 for `VPSDE`; only
    `euler` and `euler_maruyama` end at 0.

    `steps` is the number of network evaluations, for every solver. The coefficients are float64
    numbers that are known before the first evaluation, so the loop never waits for the device.

    `noise_fn(x, t)`: returns the predicted noise, shaped like `x`, at the time `t` in
    [min_time, 1], a 0-d tensor on the CPU, which can be read without waiting for the device. The
    condition `log_snr` of a network is `schedule.condition_at(t)` (see `guided`). `x`: unit
    Gaussian noise [B, ...]; the state keeps its dtype. `spacing`: spacing of the time grid. "time"
    is uniform in t; its last interval then covers a large part of the range of λ, the integration
    variable. "log_snr" is uniform in λ; the result is much closer to the exact solution, but many
    evaluations are spent at very low noise. `clip`: range to which every predicted image is
    clipped; pixels have one, latents (and the published sampler) none. `progress`: called after
    every evaluation. Returns the sample, shaped like `x`; no gradients are recorded.

    Raises ValueError for `steps` not a whole number of at least 1, for another `spacing`, for an
    empty `clip`, for `x` not floating point and for a prediction of another shape.
    """

    def __call__(
        self,
        noise_fn: NoiseFn,
        x: Tensor,
        schedule: Schedule,
        steps: int,
        *,
        spacing: Spacing = "time",
        clip: tuple[float, float] | None = None,
        progress: Callable[[], object] | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class _Stage:
    """One network evaluation at `time`, and the coefficients of the next state.

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
    schedule: Schedule,
    steps: int,
    *,
    spacing: Spacing = "time",
    clip: tuple[float, float] | None = None,
    progress: Callable[[], object] | None = None,
) -> Tensor:
    """Solve to the schedule's end with DPM-Solver++ (single-step, order 3), as published.

    The grid has `steps` intervals. Each group of three intervals is one step of order 3. The end of
    the grid uses lower orders: one step of order 2 and one of order 1 if `steps` mod 3 is 0, one
    step of order 1 if it is 1, one step of order 2 if it is 2. See `Solver` for arguments and
    errors.

    Source: Lu et al. 2022, arXiv 2211.01095 (clipping: its static thresholding), and arXiv
    2206.00927 for the split into orders.
    """
    _check(x, steps, spacing, clip)
    return _follow(_plan(schedule, steps, spacing), noise_fn, x, clip, progress)


@torch.no_grad()
def dpm_solver_multistep(
    noise_fn: NoiseFn,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    order: Literal[1, 2, 3] = 2,
    spacing: Spacing = "time",
    clip: tuple[float, float] | None = None,
    progress: Callable[[], object] | None = None,
) -> Tensor:
    """Solve with multistep DPM-Solver++ of the given order, one evaluation per step.

    Order 1 is DDIM without noise (eta 0), 2 is "2M", 3 is "3M". The grid has `steps` intervals.
    The order of the first steps is limited by the number of predictions so far. With fewer than 15
    steps the last two have orders of at most 2 and 1, which is more stable. With 15 or more, use
    order 3 with the spacing "log_snr": uniform in time, the last interval is so long in λ that the
    parabola is a bad approximation.
    See `Solver` for arguments and errors. Also raises ValueError if `order` is not 1, 2 or 3.

    Order 3 integrates the parabola through the last three predictions exactly. diffusers uses half
    of its curvature, so its error is of second order.

    Source: Lu et al. 2022, arXiv 2211.01095, algorithm 2 and appendix; Song et al. 2020, arXiv
    2010.02502 (DDIM).
    """
    _check(x, steps, spacing, clip)
    if order not in (1, 2, 3):
        raise ValueError(f"order: got {order!r}, expected 1, 2 or 3")
    images: list[Tensor] = []
    for step in _multistep_plan(schedule, steps, order, spacing):
        image = _predict(noise_fn, x, step.time, step.alpha, step.sigma, clip)
        images = [image, *images][:order]
        x = step.keep * x
        for weight, earlier in zip(step.weights, images, strict=False):
            x = x + weight * earlier
        if progress is not None:
            progress()
    return x


@torch.no_grad()
def heun(
    noise_fn: NoiseFn,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    spacing: Spacing = "time",
    clip: tuple[float, float] | None = None,
    progress: Callable[[], object] | None = None,
) -> Tensor:
    """Solve the ODE of `x/α` as a function of `σ/α` with Heun's method, of order 2.

    The grid has `⌈steps/2⌉` intervals with two evaluations each. If `steps` is odd, the last one is
    an Euler step with one evaluation. See `Solver` for arguments and errors.

    Source: Karras et al. 2022, arXiv 2206.00364, algorithm 1.
    """
    _check(x, steps, spacing, clip)
    times = time_grid(schedule, -(-steps // 2), spacing)
    groups = [_heun_group(schedule, begin, end) for begin, end in pairwise(times)]
    if steps % 2:
        groups[-1] = groups[-1][:1]
    return _follow(groups, noise_fn, x, clip, progress)


@torch.no_grad()
def euler(
    noise_fn: NoiseFn,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    spacing: Spacing = "time",
    clip: tuple[float, float] | None = None,
    progress: Callable[[], object] | None = None,
) -> Tensor:
    """Solve the probability-flow ODE in t with Euler's method, of order 1, to t = 0.

    `dx/dt = −½·β·(x + score)`, where the score is `−ε/σ`. The times are `steps` points from t = 1
    to 1/1000, then 0, as in the published code of pixel models. See `Solver` for arguments and
    errors.

    Source: Song et al. 2021, arXiv 2011.13456, equation 13.
    """
    _check(x, steps, spacing, clip)
    plan = _euler_plan(schedule, steps, spacing, 0.5)
    return _follow_euler(plan, noise_fn, x, clip, progress)


@torch.no_grad()
def euler_maruyama(
    noise_fn: NoiseFn,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    spacing: Spacing = "time",
    clip: tuple[float, float] | None = None,
    progress: Callable[[], object] | None = None,
    draw: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Solve the reverse SDE with the method of Euler and Maruyama, to t = 0.

    `dx = −β·(½·x + score)·dt + √β·dw`, where the score is `−ε/σ`; times as in `euler`. Each step
    but the last adds noise. `draw()` returns that noise, unit Gaussian and shaped like `x`; by
    default it comes from the global random state. See `Solver` for other arguments and errors.

    Source: Song et al. 2021, arXiv 2011.13456, equation 6.
    """
    _check(x, steps, spacing, clip)
    plan = _euler_plan(schedule, steps, spacing, 1.0)
    return _follow_euler(plan, noise_fn, x, clip, progress, draw)


SolverName = Literal["dpm++", "dpm++2m", "dpm++3m", "ddim", "heun", "euler", "euler-maruyama"]

SOLVERS: dict[SolverName, Solver] = {
    "dpm++": dpm_solver_singlestep,
    "dpm++2m": partial(dpm_solver_multistep, order=2),
    "dpm++3m": partial(dpm_solver_multistep, order=3),
    "ddim": partial(dpm_solver_multistep, order=1),
    "heun": heun,
    "euler": euler,
    "euler-maruyama": euler_maruyama,
}
"""Solvers by name; "dpm++" is the published one."""


def _check(x: Tensor, steps: int, spacing: Spacing, clip: tuple[float, float] | None) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps: got {steps!r}, expected a whole number of at least 1")
    if spacing not in get_args(Spacing):
        raise ValueError(f"spacing: got {spacing!r}, expected one of {get_args(Spacing)}")
    if clip is not None and not clip[0] < clip[1]:
        raise ValueError(f"clip: got {clip}, expected a lower and a higher number")
    check_tensors(x=x)
    if not x.is_floating_point():
        raise ValueError(f"x: got {x.dtype}, expected a floating-point dtype")


def _predict(
    noise_fn: NoiseFn,
    x: Tensor,
    time: float,
    alpha: float,
    sigma: float,
    clip: tuple[float, float] | None,
) -> Tensor:
    """Predict the image x̂0 from `x`, clipped, in the shape and dtype of `x`."""
    t = torch.full((), time, dtype=torch.promote_types(x.dtype, torch.float32), device="cpu")
    noise = noise_fn(x, t)
    if noise.shape != x.shape:
        raise ValueError(
            f"noise_fn: returned shape {tuple(noise.shape)}, expected that of x, {tuple(x.shape)}"
        )
    image = (x - sigma * noise.to(x.dtype)) / alpha
    return image if clip is None else image.clamp(*clip)


def _follow(
    groups: Sequence[Sequence[_Stage]],
    noise_fn: NoiseFn,
    x: Tensor,
    clip: tuple[float, float] | None,
    progress: Callable[[], object] | None,
) -> Tensor:
    for group in groups:
        start, first = x, None
        for stage in group:
            image = _predict(noise_fn, x, stage.time, stage.alpha, stage.sigma, clip)
            first = image if first is None else first
            x = stage.start * start + stage.first * first + stage.latest * image
            if progress is not None:
                progress()
    return x


def time_grid(
    schedule: Schedule, intervals: int, spacing: Spacing = "time", end: float | None = None
) -> list[float]:
    """Return the times from 1 to `end`, by default the schedule's."""
    last = schedule.min_time if end is None else end
    if spacing == "time":
        inner = [1 + (last - 1) * i / intervals for i in range(1, intervals)]
    else:
        least, most = schedule.half_log_snr(1.0), schedule.half_log_snr(last)
        inner = [
            schedule.time_at(least + (most - least) * i / intervals) for i in range(1, intervals)
        ]
    return [1.0, *inner, last]


def _plan(schedule: Schedule, steps: int, spacing: Spacing = "time") -> list[list[_Stage]]:
    groups, rest = divmod(steps, 3)
    orders = [3] * groups + [rest] if rest else [3] * (groups - 1) + [2, 1]
    grid = time_grid(schedule, steps, spacing)
    ends = accumulate(orders, initial=0)
    return [_group(schedule, grid[begin : end + 1]) for begin, end in pairwise(ends)]


def _group(schedule: Schedule, times: Sequence[float]) -> list[_Stage]:
    """Return one solver step of order `len(times) − 1` from the first time to the last.

    The exact solution integrates x̂0 over λ against an exponential. Each state approximates x̂0 by
    the line through the group's first and latest predictions. With `h` the increase of λ since the
    first time, the integral of that line is `α·(1 − e⁻ʰ)` for its constant part and
    `α·(h − 1 + e⁻ʰ)` for its slope. The published inner times are on the time grid, not at thirds
    of λ.
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
            # Order 2 uses h/2·(1 − e⁻ʰ) for the slope's integral, as the published sampler does:
            # equal to leading order.
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


def _heun_group(schedule: Schedule, begin: float, end: float) -> list[_Stage]:
    """Return an Euler step from `begin` to `end`, and its correction by the mean of both slopes.

    The slope of `x/α` over `σ/α` is `(x/α − x̂0)/(σ/α)`. With `r` the ratio of `σ/α` at the end to
    that at the beginning, the Euler step is `x/α ← r·x/α + (1 − r)·x̂0`. Inserted into the mean of
    the slopes it gives `r·x/α + (1 − r)·((2 − 1/r)·x̂0 + 1/r·x̂0′)/2`.
    """
    (alpha, sigma), (end_alpha, end_sigma) = schedule.alpha_sigma(begin), schedule.alpha_sigma(end)
    log_ratio = schedule.half_log_snr(begin) - schedule.half_log_snr(end)
    whole = -end_alpha * math.expm1(log_ratio)
    inverse = math.exp(-log_ratio)
    start = end_sigma / sigma
    return [
        _Stage(begin, alpha, sigma, start, first=whole, latest=0.0),
        _Stage(
            end,
            end_alpha,
            end_sigma,
            start,
            first=whole * (2 - inverse) / 2,
            latest=whole * inverse / 2,
        ),
    ]


@dataclass(frozen=True)
class _Step:
    """One evaluation at `time`; next state `keep·x + Σ weights·x̂0`, latest prediction first."""

    time: float
    alpha: float
    sigma: float
    keep: float
    weights: tuple[float, ...]


def _multistep_plan(schedule: Schedule, steps: int, order: int, spacing: Spacing) -> list[_Step]:
    times = time_grid(schedule, steps, spacing)
    rates = [schedule.alpha_sigma(t) for t in times]
    growth = [schedule.half_log_snr(b) - schedule.half_log_snr(a) for a, b in pairwise(times)]
    plan = []
    for i in range(steps):
        possible = min(order, i + 1, steps - i if steps < 15 else order)
        alpha, sigma = rates[i + 1]
        weights = _multistep_weights(growth[i::-1][:possible])
        plan.append(
            _Step(
                time=times[i],
                alpha=rates[i][0],
                sigma=rates[i][1],
                keep=sigma / rates[i][1],
                weights=tuple(alpha * weight for weight in weights),
            )
        )
    return plan


def _multistep_weights(growth: Sequence[float]) -> tuple[float, ...]:
    """Return the weight of each prediction, latest first, in the next image divided by `α`.

    `growth` is the increase of λ in this step, then in the steps before it, one for each order. The
    solution integrates the polynomial through the predictions over λ against an exponential.
    `constant`, `linear` and `square` are the integrals of 1, s and s², where `s` is the increase of
    λ since this step began.
    """
    h, *earlier = growth
    constant = -math.expm1(-h)
    if not earlier:
        return (constant,)
    if len(earlier) == 1:
        # h/2·(1 − e⁻ʰ) for the slope's integral, as published: equal to leading order.
        slope = h * constant / 2 / earlier[0]
        return constant + slope, -slope
    linear = h - constant
    square = h * h - 2 * linear
    before, second = earlier
    curvature = (linear * before + square) / (before + second)
    slope = (linear + curvature) / before
    return constant + slope, -slope - curvature / second, curvature / second


_EULER_END = 1e-3
"""Last time before 0 of the published Euler and Euler–Maruyama samplers."""


@dataclass(frozen=True)
class _EulerStep:
    """One evaluation at `time`; next state `keep·x + weight·x̂0 + noise·z`."""

    time: float
    alpha: float
    sigma: float
    keep: float
    weight: float
    noise: float


def _euler_plan(schedule: Schedule, steps: int, spacing: Spacing, share: float) -> list[_EulerStep]:
    """Return the steps of the ODE (`share` of the score ½) or of the reverse SDE (1).

    With `h = β·Δt` the next state is `x + h·(½·x + share·score)`, and the score of the predicted
    image is `(α·x̂0 − x)/σ²`.
    """
    times = time_grid(schedule, steps - 1, spacing, _EULER_END) if steps > 1 else [1.0]
    plan = []
    for time, end in pairwise([*times, 0.0]):
        alpha, sigma = schedule.alpha_sigma(time)
        h = schedule.beta(time) * (time - end)
        score = share * h / sigma**2
        noisy = share == 1 and end > 0
        plan.append(
            _EulerStep(
                time,
                alpha,
                sigma,
                keep=1 + h / 2 - score,
                weight=score * alpha,
                noise=math.sqrt(h) if noisy else 0.0,
            )
        )
    return plan


def _follow_euler(
    plan: Sequence[_EulerStep],
    noise_fn: NoiseFn,
    x: Tensor,
    clip: tuple[float, float] | None,
    progress: Callable[[], object] | None,
    draw: Callable[[], Tensor] | None = None,
) -> Tensor:
    for step in plan:
        image = _predict(noise_fn, x, step.time, step.alpha, step.sigma, clip)
        x = step.keep * x + step.weight * image
        if step.noise:
            fresh = torch.randn_like(x) if draw is None else draw().to(x.dtype)
            x = x + step.noise * fresh
        if progress is not None:
            progress()
    return x
