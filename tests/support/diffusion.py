"""Noise models, schedules and problems with known solutions."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dimr_fast.diffusion import SOLVERS, DiscreteSchedule, SolverName, Spacing
from tests.support.paths import FILES

GOLDEN = load_file(FILES / "diffusion.safetensors")
"""Numbers of the published diffusion code."""
SCHEDULE = DiscreteSchedule()


def with_class(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the conditional noise of the published samples."""
    return torch.tanh(x * (0.5 + t))


def without_class(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the unconditional noise of the published samples."""
    return torch.tanh(x * (0.3 + 0.5 * t))


class ClassModel:
    """The two noise models of the published samples as one conditional model; label 0 is null.

    `calls` records the arguments of each call.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __call__(self, x: torch.Tensor, condition: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls.append((x, condition, y))
        t = ((condition + 4) / 8).view(-1, 1, 1, 1)
        return torch.where((y == 0).view(-1, 1, 1, 1), without_class(x, t), with_class(x, t))


def assert_argument_is_named(call: Callable[[], object], argument: str) -> None:
    """Check that a call raises ValueError naming an argument, its value and what is expected."""
    with pytest.raises(ValueError, match=r"(got|on) .*expected|returned .*expected") as caught:
        call()
    assert str(caught.value).startswith(f"{argument}:")


X = torch.linspace(-2, 2, 9, dtype=torch.float64)


class SmoothSchedule:
    """A schedule with smooth λ(t) from t = 1 to t = min_time.

    The kinks of the discrete schedule, and its steep λ near t = 0, would limit the order of every
    solver. At t = 1 an input is nearly pure noise (α = 4e-6), so that the first steps of a
    multistep solver, of lower order, cost no accuracy.
    """

    min_time = 0.25

    def log_alpha(self, t: float) -> float:
        return -12.5 * t * t

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        return math.exp(self.log_alpha(t)), math.sqrt(-math.expm1(2 * self.log_alpha(t)))

    def half_log_snr(self, t: float) -> float:
        alpha, sigma = self.alpha_sigma(t)
        return math.log(alpha / sigma)

    def beta(self, t: float) -> float:
        return 50 * t


class GaussianProblem:
    """Data from N(mean, std²), whose noise prediction and solution are known exactly."""

    mean, std = 0.7, 0.4

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule

    def marginal_std(self, t: float) -> float:
        alpha, sigma = self.schedule.alpha_sigma(t)
        return math.hypot(alpha * self.std, sigma)

    def noise_fn(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = self.schedule.alpha_sigma(t.item())
        return sigma * (x - alpha * self.mean) / self.marginal_std(t.item()) ** 2

    def solution(self, x: torch.Tensor) -> torch.Tensor:
        """Return the exact solution at the end of the schedule from `x` at t = 1."""
        end = self.schedule.min_time
        standard = (x - self.schedule.alpha_sigma(1.0)[0] * self.mean) / self.marginal_std(1.0)
        return self.schedule.alpha_sigma(end)[0] * self.mean + self.marginal_std(end) * standard

    def error(self, name: SolverName, steps: int, spacing: Spacing = "time") -> float:
        sample = SOLVERS[name](self.noise_fn, X, self.schedule, steps, spacing=spacing)
        return (sample - self.solution(X)).abs().max().item()
