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
class SolverStep:
    """One network evaluation at `time`, and the coefficients of the next state.

    The next state is `keep·x + Σ weight·x̂0 + noise·z`. `x` is the state of `since` evaluations ago,
    0 for the state that was evaluated now. `images` are pairs (age, weight) of predicted images x̂0,
    where 0 is the age of the image that was predicted now. `z` is unit Gaussian noise. Ages are
    below `HISTORY`.
    """

    time: float
    alpha: float
    sigma: float
    keep: float
    images: tuple[tuple[int, float], ...]
    since: int = 0
    noise: float = 0.0


HISTORY = 3
"""Evaluations that a step may look back to, its own included."""


class SolverState:
    """The recent states and predicted images of a solver, which its next step is computed from."""

    def __init__(self) -> None:
        self._states: list[Tensor] = []
        self._images: list[Tensor] = []

    def advance(
        self,
        step: SolverStep,
        x: Tensor,
        noise: Tensor,
        clip: tuple[float, float] | None,
        draw: Callable[[], Tensor],
    ) -> Tensor:
        """Return the next state, from the state `x` and the noise that was predicted in it.

        Both have one shape; the result has the dtype of `x`. `clip`: as for `Solver`. `draw` is
        called by steps with noise and returns unit Gaussian noise shaped like `x`.
        """
        image = (x - step.sigma * noise.to(x.dtype)) / step.alpha
        image = image if clip is None else image.clamp(*clip)
        self._states = [x, *self._states][:HISTORY]
        self._images = [image, *self._images][:HISTORY]
        x = step.keep * self._states[step.since]
        for age, weight in step.images:
            x = x + weight * self._images[age]
        return x + step.noise * draw().to(x.dtype) if step.noise else x


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
    return _follow(_singlestep_plan(schedule, steps, spacing), noise_fn, x, clip, progress)


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
    plan = _multistep_plan(schedule, steps, spacing, order)
    return _follow(plan, noise_fn, x, clip, progress)


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
    return _follow(_heun_plan(schedule, steps, spacing), noise_fn, x, clip, progress)


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
    return _follow(_euler_plan(schedule, steps, spacing, 0.5), noise_fn, x, clip, progress)


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
    return _follow(plan, noise_fn, x, clip, progress, draw)


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


def _check_grid(steps: int, spacing: Spacing) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps: got {steps!r}, expected a whole number of at least 1")
    if spacing not in get_args(Spacing):
        raise ValueError(f"spacing: got {spacing!r}, expected one of {get_args(Spacing)}")


def _check(x: Tensor, steps: int, spacing: Spacing, clip: tuple[float, float] | None) -> None:
    _check_grid(steps, spacing)
    if clip is not None and not clip[0] < clip[1]:
        raise ValueError(f"clip: got {clip}, expected a lower and a higher number")
    check_tensors(x=x)
    if not x.is_floating_point():
        raise ValueError(f"x: got {x.dtype}, expected a floating-point dtype")


def _follow(
    plan: Sequence[SolverStep],
    noise_fn: NoiseFn,
    x: Tensor,
    clip: tuple[float, float] | None,
    progress: Callable[[], object] | None,
    draw: Callable[[], Tensor] | None = None,
) -> Tensor:
    state, shape, dtype = SolverState(), x.shape, torch.promote_types(x.dtype, torch.float32)
    if draw is None:
        draw = partial(torch.randn_like, x)
    for step in plan:
        noise = noise_fn(x, torch.full((), step.time, dtype=dtype, device="cpu"))
        if noise.shape != shape:
            raise ValueError(
                f"noise_fn: returned shape {tuple(noise.shape)}, expected that of x, {tuple(shape)}"
            )
        x = state.advance(step, x, noise, clip, draw)
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


def solver_plan(
    solver: SolverName, schedule: Schedule, steps: int, spacing: Spacing = "time"
) -> list[SolverStep]:
    """Return the steps of a solver of `SOLVERS`, for loops that evaluate the network themselves.

    Start with unit Gaussian noise and a new `SolverState`, and call its `advance` for each step.
    Raises ValueError for `steps` not a whole number of at least 1, and for another solver or
    spacing.
    """
    if solver not in _PLANS:
        raise ValueError(f"solver: got {solver!r}, expected one of {', '.join(_PLANS)}")
    _check_grid(steps, spacing)
    return _PLANS[solver](schedule, steps, spacing)


def _singlestep_plan(schedule: Schedule, steps: int, spacing: Spacing) -> list[SolverStep]:
    groups, rest = divmod(steps, 3)
    orders = [3] * groups + [rest] if rest else [3] * (groups - 1) + [2, 1]
    grid = time_grid(schedule, steps, spacing)
    ends = accumulate(orders, initial=0)
    groups_of_times = [grid[begin : end + 1] for begin, end in pairwise(ends)]
    return [step for times in groups_of_times for step in _group(schedule, times)]


def _group(schedule: Schedule, times: Sequence[float]) -> list[SolverStep]:
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
    steps = []
    for i in range(order):
        alpha, sigma = rates[i + 1]
        constant = -math.expm1(-h[i + 1])
        weights: tuple[tuple[int, float], ...] = ((0, alpha * constant),)
        if i > 0:
            # Order 2 uses h/2·(1 − e⁻ʰ) for the slope's integral, as the published sampler does:
            # equal to leading order.
            integral = h[i + 1] * constant / 2 if order == 2 else h[i + 1] - constant
            slope = integral / h[i]
            weights = (i, alpha * (constant - slope)), (0, alpha * slope)
        steps.append(SolverStep(times[i], *rates[i], sigma / rates[0][1], weights, since=i))
    return steps


def _heun_plan(schedule: Schedule, steps: int, spacing: Spacing) -> list[SolverStep]:
    times = time_grid(schedule, -(-steps // 2), spacing)
    plan = [step for begin, end in pairwise(times) for step in _heun_group(schedule, begin, end)]
    return plan[:steps]


def _heun_group(schedule: Schedule, begin: float, end: float) -> list[SolverStep]:
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
    both = (1, whole * (2 - inverse) / 2), (0, whole * inverse / 2)
    return [
        SolverStep(begin, alpha, sigma, start, ((0, whole),)),
        SolverStep(end, end_alpha, end_sigma, start, both, since=1),
    ]


def _multistep_plan(
    schedule: Schedule, steps: int, spacing: Spacing, order: int
) -> list[SolverStep]:
    times = time_grid(schedule, steps, spacing)
    rates = [schedule.alpha_sigma(t) for t in times]
    growth = [schedule.half_log_snr(b) - schedule.half_log_snr(a) for a, b in pairwise(times)]
    plan = []
    for i in range(steps):
        possible = min(order, i + 1, steps - i if steps < 15 else order)
        alpha, sigma = rates[i + 1]
        weights = [alpha * weight for weight in _multistep_weights(growth[i::-1][:possible])]
        keep = sigma / rates[i][1]
        plan.append(SolverStep(times[i], *rates[i], keep, tuple(enumerate(weights))))
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


def _euler_plan(schedule: Schedule, steps: int, spacing: Spacing, share: float) -> list[SolverStep]:
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
        noise = math.sqrt(h) if share == 1 and end > 0 else 0.0
        keep, weight = 1 + h / 2 - score, score * alpha
        plan.append(SolverStep(time, alpha, sigma, keep, ((0, weight),), noise=noise))
    return plan


_PLANS: dict[SolverName, Callable[[Schedule, int, Spacing], list[SolverStep]]] = {
    "dpm++": _singlestep_plan,
    "dpm++2m": partial(_multistep_plan, order=2),
    "dpm++3m": partial(_multistep_plan, order=3),
    "ddim": partial(_multistep_plan, order=1),
    "heun": _heun_plan,
    "euler": partial(_euler_plan, share=0.5),
    "euler-maruyama": partial(_euler_plan, share=1.0),
}
