"""Consistency distillation: identities that hold for any teacher, and a case that is solved."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dimr_fast.diffusion import (
    SOLVERS,
    VPSDE,
    DiscreteSchedule,
    Schedule,
    consistency_loss,
    consistency_target,
    consistency_times,
)

SCHEDULES = [DiscreteSchedule(), VPSDE()]
MEANS = torch.tensor([-1.5, 0.5, 2.0], dtype=torch.float64)
DEVIATION = 0.3


def noise_of_mixture(schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the exact noise prediction for data of an equal mixture of three Gaussians."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        rates = [schedule.alpha_sigma(float(value)) for value in t.reshape(-1)]
        alpha, sigma = torch.tensor(rates, dtype=torch.float64).T
        alpha, sigma = (rate.view(-1, *[1] * (x.ndim - 1)) for rate in (alpha, sigma))
        variance = (alpha * DEVIATION) ** 2 + sigma**2
        away = x.double()[..., None] - alpha[..., None] * MEANS
        weights = torch.softmax(-0.5 * away.square() / variance[..., None], -1)
        return (sigma / variance * (weights * away).sum(-1)).to(x.dtype)

    return predict


def noise_of_gaussian(schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the exact noise prediction for data of the first Gaussian alone."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(float(t.reshape(-1)[0]))
        variance = (alpha * DEVIATION) ** 2 + sigma**2
        return sigma / variance * (x - alpha * MEANS[0])

    return predict


def end_of_flow(schedule: Schedule, x: Tensor, begin: float, end: float) -> Tensor:
    """Return where the exact probability flow of the first Gaussian takes `x`."""
    (alpha, sigma), (end_alpha, end_sigma) = map(schedule.alpha_sigma, (begin, end))
    deviation, end_deviation = (
        math.hypot(a * DEVIATION, s) for a, s in ((alpha, sigma), (end_alpha, end_sigma))
    )
    return end_alpha * MEANS[0] + end_deviation / deviation * (x - alpha * MEANS[0])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["discrete", "vp-sde"])
@pytest.mark.parametrize("evaluations", [1, 2, 4])
def test_a_student_that_has_learned_samples_as_its_teacher(
    schedule: Schedule, evaluations: int
) -> None:
    """The recursion of the target, from the end of an interval to its beginning, is the student
    that has converged: its DDIM steps lead where the teacher's many steps lead."""
    teacher, teacher_steps = noise_of_mixture(schedule), 40
    calls = 0

    def student(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        draw = (1 - float(t.reshape(-1)[0])) / (1 - schedule.min_time)
        times = consistency_times(schedule, [draw] * len(x), evaluations, teacher_steps)
        if times.reaches_end.all():
            return teacher(x, times.time)
        return consistency_target(x, times, teacher, student)

    x = torch.randn(200, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sample = SOLVERS["ddim"](student, x, schedule, evaluations)
    assert calls > teacher_steps / 2
    # The same steps by the teacher alone, written out.
    state, time = x, 1.0
    ends = [1 - (k + 1) / evaluations * (1 - schedule.min_time) for k in range(evaluations)]
    step = (schedule.half_log_snr(schedule.min_time) - schedule.half_log_snr(1.0)) / teacher_steps
    for end in (*ends[:-1], schedule.min_time):
        while time > end + 1e-9:
            following = max(schedule.time_at(schedule.half_log_snr(time) + step), end)
            (alpha, sigma), (next_alpha, next_sigma) = map(schedule.alpha_sigma, (time, following))
            noise = teacher(state, torch.full((), time, dtype=torch.float64))
            state = next_alpha * (state - sigma * noise) / alpha + next_sigma * noise
            time = following
    # Factors and times of the batch are float32.
    torch.testing.assert_close(sample, state, atol=2e-3, rtol=0)
    assert sample.std() > 1  # all three Gaussians are reached


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["discrete", "vp-sde"])
def test_the_exact_consistency_function_is_nearly_its_own_target(schedule: Schedule) -> None:
    """The error of the target is that of the teacher's one step: of second order in its length."""
    teacher = noise_of_gaussian(schedule)

    def exact(x: Tensor, t: Tensor) -> Tensor:
        begin = float(t.reshape(-1)[0])
        end = schedule.min_time
        (alpha, sigma), (end_alpha, end_sigma) = map(schedule.alpha_sigma, (begin, end))
        factor = end_sigma - end_alpha * sigma / alpha
        if abs(factor) < 1e-9:
            return teacher(x, t)
        return (end_of_flow(schedule, x, begin, end) - end_alpha / alpha * x) / factor

    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    errors = []
    for teacher_steps in (25, 100):
        times = consistency_times(schedule, [0.3] * len(x), 1, teacher_steps)
        target = consistency_target(x, times, teacher, exact)
        errors.append((target - exact(x, times.time)).abs().max().item())
    assert errors[1] < 0.01
    assert errors[0] / errors[1] > 8  # 16 for a quarter of the length, less float32 rounding


def test_times_are_in_their_intervals_and_one_step_apart() -> None:
    schedule = DiscreteSchedule()
    draws = torch.rand(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    times = consistency_times(schedule, [0.0, *draws.tolist()], 4, 40)
    assert times.time[0] == 1
    assert times.time.min() > schedule.min_time
    assert (times.nearer < times.time).all()
    ends = torch.tensor([1 - k / 4 * (1 - schedule.min_time) for k in range(5)])
    interval = torch.bucketize(times.time, ends.flip(0))
    assert (
        torch.bucketize(times.nearer[~times.reaches_end], ends.flip(0))
        == interval[~times.reaches_end]
    ).all()
    # The grid of DDIM with as many steps: its times are the ends.
    seen: list[float] = []
    SOLVERS["ddim"](
        lambda x, t: seen.append(t.item()) or torch.zeros_like(x), torch.zeros(1), schedule, 4
    )
    torch.testing.assert_close(torch.tensor(seen), ends[:4])
    step = (schedule.half_log_snr(schedule.min_time) - schedule.half_log_snr(1.0)) / 40
    for begin, nearer, last in zip(
        times.time.tolist(), times.nearer.tolist(), times.reaches_end.tolist(), strict=True
    ):
        length = schedule.half_log_snr(nearer) - schedule.half_log_snr(begin)
        assert length < step * 1.001
        assert last or length > step * 0.999
    assert times.reaches_end.any()


def test_noisy_inputs_are_those_of_the_schedule() -> None:
    schedule = VPSDE()
    generator = torch.Generator().manual_seed(2)
    x0, noise = torch.randn(2, 5, 3, 4, 4, generator=generator)
    times = consistency_times(schedule, [0.0, 0.2, 0.5, 0.8, 0.999], 2, 40)
    torch.testing.assert_close(
        times.noisy(x0, noise), schedule.add_noise(x0, noise, times.time), atol=1e-4, rtol=1e-4
    )


def test_the_loss_is_the_distance_between_the_ends() -> None:
    schedule = DiscreteSchedule()
    generator = torch.Generator().manual_seed(3)
    times = consistency_times(schedule, [0.0, 0.4, 0.9], 2, 40)
    x, target = torch.randn(2, 3, 3, 8, 8, generator=generator)
    prediction = target + 0.1 * torch.randn(3, 3, 8, 8, generator=generator)
    (loss, ends) = (
        consistency_loss([prediction], target, times),
        times.whole(x, prediction) - times.whole(x, target),
    )
    distance = ends.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(loss, (distance**2 + 1e-4).sqrt() - 0.01, atol=1e-5, rtol=1e-4)
    assert consistency_loss([target], target, times).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"evaluations": 0}, "evaluations: got 0, expected 1 or more"),
        ({"teacher_steps": 0}, "teacher_steps: got 0, expected 1 or more"),
        ({"draws": [0.5, 1.0]}, r"draws: got \[1.0\], expected numbers in 0 <= u < 1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        consistency_times(
            DiscreteSchedule(),
            **{"draws": [0.5], "evaluations": 2, "teacher_steps": 40} | arguments,
        )
