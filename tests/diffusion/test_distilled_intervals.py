"""The mathematics of distillation: against the solver, and against exact probability flows."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dimr_fast.diffusion import (
    SOLVERS,
    VPSDE,
    DiscreteSchedule,
    Schedule,
    distillation_loss,
    draw_intervals,
    teacher_target,
)

SCHEDULES = [DiscreteSchedule(), VPSDE()]
MEANS = torch.tensor([-1.5, 0.5, 2.0], dtype=torch.float64)
DEVIATION = 0.3


def noise_of_mixture(
    schedule: Schedule, means: Tensor = MEANS
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the exact noise prediction for data of an equal mixture of Gaussians."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        rates = [schedule.alpha_sigma(float(value)) for value in t.reshape(-1)]
        alpha, sigma = torch.tensor(rates, dtype=torch.float64).T
        alpha, sigma = (rate.view(-1, *[1] * (x.ndim - 1)) for rate in (alpha, sigma))
        variance = (alpha * DEVIATION) ** 2 + sigma**2
        away = x.double()[..., None] - alpha[..., None] * means
        weights = torch.softmax(-0.5 * away.square() / variance[..., None], -1)
        return (sigma / variance * (weights * away).sum(-1)).to(x.dtype)

    return predict


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["discrete", "vp-sde"])
@pytest.mark.parametrize("clip", [None, (-2.0, 1.5)], ids=["unclipped", "clipped"])
def test_a_student_of_one_step_draws_what_the_solver_of_the_teacher_draws(
    schedule: Schedule, clip: tuple[float, float] | None
) -> None:
    teacher = noise_of_mixture(schedule)
    x = torch.randn(200, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def student(x: Tensor, t: Tensor) -> Tensor:
        assert t.item() == 1
        return teacher_target(x, draw_intervals(schedule, [0.0] * len(x), 1, 8), teacher, clip)

    drawn = SOLVERS["ddim"](student, x, schedule, 1, spacing="log_snr")
    expected = SOLVERS["dpm++2m"](teacher, x, schedule, 8, spacing="log_snr", clip=clip)
    # Factors and times of a batch are float32; at pure noise α is small.
    torch.testing.assert_close(drawn, expected, atol=2e-3, rtol=0)
    assert drawn.std() > 1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["discrete", "vp-sde"])
@pytest.mark.parametrize("evaluations", [1, 2, 4])
def test_a_student_that_has_learned_follows_the_probability_flow(
    schedule: Schedule, evaluations: int
) -> None:
    """For data of one Gaussian, the flow scales the distance from the mean."""
    teacher = noise_of_mixture(schedule, MEANS[:1])
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    (alpha, sigma), (end_alpha, end_sigma) = map(schedule.alpha_sigma, (1.0, schedule.min_time))
    scale = math.hypot(end_alpha * DEVIATION, end_sigma) / math.hypot(alpha * DEVIATION, sigma)
    exact = end_alpha * MEANS[0] + scale * (x - alpha * MEANS[0])
    errors = []
    for teacher_steps in (40, 80):
        calls = iter(range(evaluations))

        def student(
            x: Tensor, t: Tensor, calls: Iterator[int] = calls, teacher_steps: int = teacher_steps
        ) -> Tensor:
            draw = (next(calls) + 0.5) / evaluations
            intervals = draw_intervals(schedule, [draw] * len(x), evaluations, teacher_steps)
            # The times that the student learns are those at which the sampler evaluates it.
            torch.testing.assert_close(intervals.time[0], t.expand(len(x)).float())
            return teacher_target(x, intervals, teacher)

        drawn = SOLVERS["ddim"](student, x, schedule, evaluations, spacing="log_snr")
        errors.append((drawn - exact).abs().max().item())
    assert errors[1] < 0.02
    assert errors[0] / errors[1] > 1.8


def test_intervals_share_the_grid_of_the_teacher() -> None:
    schedule = DiscreteSchedule()
    intervals = draw_intervals(schedule, [0.0, 0.49, 0.5, 0.999], 2, 6)
    assert intervals.time.shape == (4, 4)
    assert (intervals.time.diff(dim=0) < 0).all()
    assert intervals.time[0, :2].tolist() == [1, 1]
    assert (intervals.time[0, 2:] == intervals.time[-1, :2]).all()
    torch.testing.assert_close(intervals.time[-1, 2:], torch.full((2,), schedule.min_time))
    lambdas = (intervals.alpha / intervals.sigma).log()
    torch.testing.assert_close(
        lambdas.diff(dim=0), torch.full((3, 4), intervals.step), rtol=1e-3, atol=1e-3
    )


def test_inputs_are_those_of_the_schedule() -> None:
    schedule = VPSDE()
    generator = torch.Generator().manual_seed(2)
    x0, noise = torch.randn(2, 5, 3, 4, 4, generator=generator)
    intervals = draw_intervals(schedule, [0.0, 0.2, 0.5, 0.8, 0.999], 4, 8)
    torch.testing.assert_close(
        intervals.start(x0, noise),
        schedule.add_noise(x0, noise, intervals.time[0]),
        atol=1e-4,
        rtol=1e-4,
    )


def test_the_loss_is_the_distance_between_the_ends() -> None:
    schedule = DiscreteSchedule()
    generator = torch.Generator().manual_seed(3)
    intervals = draw_intervals(schedule, [0.0, 0.4, 0.9], 2, 8)
    target = torch.randn(3, 3, 8, 8, generator=generator)
    prediction = target + 0.1 * torch.randn(3, 3, 8, 8, generator=generator)
    loss = distillation_loss([prediction], target, intervals)
    ends = intervals.noise.view(-1, 1, 1, 1) * (prediction - target)
    distance = ends.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(loss, (distance**2 + 1e-4).sqrt() - 0.01, atol=1e-5, rtol=1e-4)
    assert distillation_loss([target], target, intervals).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"evaluations": 0}, "evaluations: got 0, expected 1 or more"),
        ({"teacher_steps": 0}, "teacher_steps: got 0, expected a multiple of evaluations, 2"),
        ({"teacher_steps": 5}, "teacher_steps: got 5, expected a multiple of evaluations, 2"),
        ({"draws": [0.5, 1.0]}, r"draws: got \[1.0\], expected numbers in 0 <= u < 1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        draw_intervals(
            DiscreteSchedule(),
            **{"draws": [0.5], "evaluations": 2, "teacher_steps": 8} | arguments,
        )
