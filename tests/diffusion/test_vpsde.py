"""The schedule and the samplers of published pixel models, against formulas and exact solutions."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dimr_fast.diffusion import (
    SOLVERS,
    VPSDE,
    ConstantGuidance,
    DiscreteSchedule,
    SolverName,
    euler,
    euler_maruyama,
    guided,
    multi_scale_loss,
    noise_schedule,
)
from tests.support.diffusion import GaussianProblem, X, assert_argument_is_named

SDE = VPSDE()

GOLDEN = [
    (0.0001, 0.99999495026275, 0.00317796302688083, 11.503019590538717),
    (0.001, 0.9999450265110976, 0.010485416335094895, 9.115429865459795),
    (0.1, 0.946721798820598, 0.3220525355247045, 2.1565811858848662),
    (0.5, 0.28118288079675235, 0.9596542020680362, -2.4551354688215747),
    (0.9, 0.016996463261689274, 0.9998555496853503, -8.149211078502798),
    (1.0, 0.0065715864949296154, 0.9999784068923386, -10.049956813318408),
]
"""Time, α, σ and log(α²/σ²) of β(t) = 0.1 + 19.9·t, computed with 50 digits."""


@pytest.mark.parametrize(("t", "alpha", "sigma", "log_snr"), GOLDEN)
def test_the_schedule_has_the_values_of_its_formula(
    t: float, alpha: float, sigma: float, log_snr: float
) -> None:
    assert SDE.alpha_sigma(t) == pytest.approx((alpha, sigma), rel=1e-13)
    assert 2 * SDE.half_log_snr(t) == pytest.approx(log_snr, rel=1e-12)
    assert SDE.time_at(log_snr / 2) == pytest.approx(t, rel=1e-12)
    assert SDE.beta(t) == pytest.approx(0.1 + 19.9 * t, rel=1e-14)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        times = torch.tensor([[t]], dtype=dtype)
        for condition in (SDE.condition(times), SDE.condition_at(times)):
            assert (condition.dtype, condition.shape) == (dtype, (1, 1))
            assert condition.item() == pytest.approx(log_snr, rel=tolerance)
    x0, noise = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    noisy = SDE.add_noise(x0, noise, torch.tensor([t], dtype=torch.float64))
    torch.testing.assert_close(noisy, alpha * x0 + sigma * noise, rtol=1e-13, atol=1e-15)


def test_the_condition_is_limited_as_published() -> None:
    """At t = 0 the ratio is infinite; the published code limits it to a million."""
    condition = SDE.condition(torch.tensor([0.0, 1e-6, 1.0]))
    expected = torch.tensor([math.log(1e6), math.log(1e6), GOLDEN[-1][3]])
    torch.testing.assert_close(condition, expected)


@given(st.floats(1e-4, 1.0))
def test_beta_is_the_slope_of_both_schedules(t: float) -> None:
    step = 1e-7
    for schedule in (SDE, DiscreteSchedule()):
        if not schedule.min_time + step < t < 1 - step:
            continue
        if isinstance(schedule, DiscreteSchedule) and abs(t * 1000 - round(t * 1000)) < 1e-3:
            continue  # the slope changes here
        slope = (schedule.log_alpha(t + step) - schedule.log_alpha(t - step)) / (2 * step)
        assert schedule.beta(t) == pytest.approx(-2 * slope, rel=1e-4)


def test_times_to_train_at_are_uniform_and_finite() -> None:
    torch.manual_seed(0)
    times = SDE.draw(100_000)
    assert (times.dtype, times.shape) == (torch.float32, (100_000,))
    assert 0 <= times.min() < 1e-3
    assert 1 - 1e-3 < times.max() < 1
    assert abs(times.mean().item() - 0.5) < 0.01
    assert SDE.condition(times).isfinite().all()
    torch.manual_seed(3)
    steps = DiscreteSchedule().draw(1000)
    torch.manual_seed(3)
    assert torch.equal(steps, torch.randint(1, 1001, (1000,)))


def test_the_loss_of_the_exact_noise_is_that_of_the_formula() -> None:
    """A network that recovers the noise from x_t, x_0 and its condition has no loss."""
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 8, 3, 8, 8, dtype=torch.float64)
    t = SDE.draw(8).double().clamp(min=0.05)
    noisy, log_snr = SDE.add_noise(x0, noise, t), SDE.condition(t).view(-1, 1, 1, 1)
    alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
    assert multi_scale_loss([(noisy - alpha * x0) / sigma], noise).max() < 1e-20


def published_times(steps: int) -> list[tuple[float, float]]:
    """Return pairs of a time and the next: `steps` points from 1 to 1/1000, then 0."""
    return list(pairwise([*np.linspace(1, 1e-3, steps).tolist(), 0.0]))


def noise_model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x * (0.5 + t))


@pytest.mark.parametrize("steps", [2, 3, 25, 250])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_euler_steps_are_those_of_the_formula(steps: int, share: float) -> None:
    """`x + (drift − share·β·score)·Δt`, plus `√(β·|Δt|)·z` for the SDE before the last step."""
    torch.manual_seed(0)
    start = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    fresh = torch.randn(steps, *start.shape, dtype=torch.float64)
    x = start
    for i, (t, end) in enumerate(published_times(steps)):
        beta = 0.1 + 19.9 * t
        sigma = math.sqrt(1 - math.exp(-(0.1 * t + 9.95 * t * t)))
        score = -noise_model(x, torch.tensor(t, dtype=torch.float64)) / sigma
        x = x + (-0.5 * beta * x - share * beta * score) * (end - t)
        if share == 1 and end > 0:
            x = x + math.sqrt(beta * (t - end)) * fresh[i]
    drawn: Iterator[torch.Tensor] = iter(fresh)
    if share == 1:
        found = euler_maruyama(noise_model, start, SDE, steps, draw=lambda: next(drawn))
    else:
        found = euler(noise_model, start, SDE, steps)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_euler_approaches_the_exact_solution_to_time_zero() -> None:
    problem = GaussianProblem(SDE)
    alpha = SDE.alpha_sigma(1.0)[0]
    exact = problem.mean + problem.std * (X - alpha * problem.mean) / problem.marginal_std(1.0)
    errors = [
        (euler(problem.noise_fn, X, SDE, steps) - exact).abs().max().item()
        for steps in (200, 400, 800)
    ]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([1, 1], abs=0.2), errors


@pytest.mark.parametrize("schedule", [SDE, DiscreteSchedule()])
def test_euler_maruyama_draws_the_distribution_of_the_data(schedule: VPSDE) -> None:
    torch.manual_seed(0)
    problem = GaussianProblem(schedule)
    x = torch.randn(20_000, dtype=torch.float64)
    sample = euler_maruyama(problem.noise_fn, x, schedule, 800)
    assert sample.mean().item() == pytest.approx(problem.mean, abs=0.01)
    assert sample.std().item() == pytest.approx(problem.std, abs=0.01)


@pytest.mark.parametrize("name", [name for name in SOLVERS if not name.startswith("euler")])
def test_other_solvers_approach_the_exact_solution(name: SolverName) -> None:
    problem = GaussianProblem(SDE)
    errors = [problem.error(name, steps, "log_snr") for steps in (20, 320)]
    assert errors[1] < errors[0] / 12
    assert problem.error(name, 250) < 0.05


def test_guidance_gives_the_condition_of_the_schedule() -> None:
    seen: list[torch.Tensor] = []

    def model(x: torch.Tensor, condition: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(condition)
        return x

    y = torch.tensor([1, 2])
    noise_fn = guided(model, y, 0, ConstantGuidance(0.4), condition=SDE.condition_at)
    noise_fn(torch.zeros(2, 3, 4, 4), torch.tensor(0.5))
    torch.testing.assert_close(seen[0], torch.tensor([GOLDEN[3][3]]).float())


def test_schedules_have_names() -> None:
    assert isinstance(noise_schedule("vp-sde"), VPSDE)
    assert isinstance(noise_schedule("discrete"), DiscreteSchedule)


IMAGES, T = torch.zeros(2, 3, 4, 4), torch.tensor([0.1, 1.0])


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: SDE.add_noise(IMAGES.long(), IMAGES, T), "x0"),
        (lambda: SDE.add_noise(IMAGES, IMAGES[:1], T), "noise"),
        (lambda: SDE.add_noise(IMAGES, IMAGES.to("meta"), T), "noise"),
        (lambda: SDE.add_noise(IMAGES, IMAGES, T[:1]), "t"),
        (lambda: SDE.add_noise(IMAGES, IMAGES, T.long()), "t"),
        (lambda: SDE.add_noise(IMAGES, IMAGES, T + 0.1), "t"),
        (lambda: SDE.condition(T * math.nan), "t"),
        (lambda: SDE.log_alpha(0.0), "t"),
        (lambda: SDE.beta(1.01), "t"),
        (lambda: SDE.time_at(math.inf), "half_log_snr"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], argument: str) -> None:
    assert_argument_is_named(call, argument)
