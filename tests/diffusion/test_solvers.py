"""Every solver against exact solutions of a problem that has them, and its contract."""

import math
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dimr_fast.diffusion import (
    SOLVERS,
    SolverName,
    dpm_solver_multistep,
    dpm_solver_singlestep,
)
from tests.support.diffusion import (
    GOLDEN,
    SCHEDULE,
    GaussianProblem,
    SmoothSchedule,
    X,
    with_class,
)

NAMES = list(SOLVERS)
ORDERS = {"dpm++": 3, "dpm++2m": 2, "dpm++3m": 3, "ddim": 1, "heun": 2}
"""Orders of the solvers that end at the schedule's end; the others are in test_vpsde.py."""


def test_the_names_are_those_of_the_solvers() -> None:
    assert list(get_args(SolverName)) == NAMES == [*ORDERS, "euler", "euler-maruyama"]
    assert SOLVERS["dpm++"] is dpm_solver_singlestep


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name: SolverName) -> None:
    """Doubling the steps divides the error by 2^order; 3k + 2 single steps end in order 2."""
    problem = GaussianProblem(SmoothSchedule())
    errors = [problem.error(name, steps) for steps in (50, 98, 194, 386)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders[-1] == pytest.approx(ORDERS[name], abs=0.1), (errors, orders)


class HalfNoise(SmoothSchedule):
    """A schedule whose inputs at t = 1 are noise and image in nearly equal parts."""

    def log_alpha(self, t: float) -> float:
        return -t * t / 3


@pytest.mark.parametrize(("steps", "order"), [(1, 1), (2, 2), (3, 1)])
def test_last_single_steps_have_their_order(steps: int, order: int) -> None:
    """The single-step solver ends in a step of order 1 or 2; its local error is of order + 1."""
    schedule = HalfNoise()
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)
    errors = []
    for length in (0.04, 0.02, 0.01, 0.005):
        schedule.min_time = 1 - length
        problem = GaussianProblem(schedule)
        sample = dpm_solver_singlestep(problem.noise_fn, x, schedule, steps)
        errors.append((sample - problem.solution(x)).abs().max().item())
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders[-1] == pytest.approx(order + 1, abs=0.25), (errors, orders)


@pytest.mark.parametrize("name", ORDERS)
def test_samples_approach_the_exact_solution(name: SolverName) -> None:
    """On the discrete schedule, to its end; uniform in λ with fewer steps than in time."""
    problem = GaussianProblem(SCHEDULE)
    errors = [problem.error(name, steps) for steps in (20, 1280)]
    assert errors[1] < errors[0] / 40
    assert problem.error(name, 25, "log_snr") < 0.6 * problem.error(name, 25)
    finer = [problem.error(name, steps, "log_snr") for steps in (20, 320)]
    assert finer[1] < finer[0] / 12 ** min(ORDERS[name], 2)


def test_single_steps_approach_the_exact_solution() -> None:
    problem = GaussianProblem(SCHEDULE)
    errors = [problem.error("dpm++", steps) for steps in (20, 80, 320, 1280)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 14, 15, 16])
def test_steps_are_network_evaluations(name: SolverName, steps: int) -> None:
    times: list[float] = []
    done: list[int] = []

    def noise_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert t.ndim == 0
        assert t.device.type == "cpu"
        times.append(t.item())
        return with_class(x, t)

    SOLVERS[name](noise_fn, X, SCHEDULE, steps, progress=lambda: done.append(len(times)))
    assert times[0] == 1
    assert times == sorted(times, reverse=True)
    assert done == list(range(1, steps + 1))


@given(st.integers(1, 300))
def test_single_steps_are_evaluated_on_a_uniform_grid(steps: int) -> None:
    times: list[float] = []

    def noise_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times.append(t.item())
        return x

    dpm_solver_singlestep(noise_fn, torch.zeros(1, dtype=torch.float64), SCHEDULE, steps)
    expected = [1 + (0.001 - 1) * i / steps for i in range(steps)]
    assert times == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_clipping_bounds_the_sample_and_a_wide_range_changes_nothing(name: SolverName) -> None:
    def draw(clip: tuple[float, float] | None) -> torch.Tensor:
        torch.manual_seed(0)  # one of the solvers is stochastic
        return SOLVERS[name](with_class, X, SCHEDULE, 12, clip=clip)

    plain = draw(None)
    bound = plain.abs().max().item() / 2
    clipped = draw((-bound, bound))
    # Above the bound is what extrapolation between predictions adds, and the noise of t = 1/1000.
    assert clipped.abs().max() < 1.5 * bound
    assert torch.equal(draw((-1e6, 1e6)), plain)


def test_clipped_single_steps_exceed_the_bound_by_the_last_noise_only() -> None:
    z = GOLDEN["sampler/z_init"]
    plain = dpm_solver_singlestep(with_class, z, SCHEDULE, 10)
    bound = plain.abs().max().item() / 2
    assert (plain.abs() > bound).any()
    clipped = dpm_solver_singlestep(with_class, z, SCHEDULE, 10, clip=(-bound, bound))
    # What is left above the bound is the noise of t = 1/1000, where σ = 0.029.
    assert clipped.abs().max() < bound + 5 * SCHEDULE.alpha_sigma(0.001)[1]
    # An early prediction divides by α = 0.07 at t = 1, so a range that never binds is wide.
    wide = dpm_solver_singlestep(with_class, z, SCHEDULE, 10, clip=(-1e6, 1e6))
    assert torch.equal(wide, plain)
    with pytest.raises(ValueError, match=r"clip: got \(1.0, -1.0\)"):
        dpm_solver_singlestep(with_class, z, SCHEDULE, 10, clip=(1.0, -1.0))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name: SolverName) -> None:
    """Tensors without values cannot be waited for."""
    x = torch.empty(2, 4, 8, 8, device="meta")
    noise_fn = lambda x, t: x * t.to(x.device)  # noqa: E731
    assert SOLVERS[name](noise_fn, x, SCHEDULE, 7, clip=(-1.0, 1.0)).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_the_state_keeps_its_dtype_the_input_its_values(
    name: SolverName, dtype: torch.dtype
) -> None:
    def noise_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert (x.dtype, t.dtype) == (dtype, torch.promote_types(dtype, torch.float32))
        return with_class(x, t).to(torch.bfloat16)

    x = torch.randn(2, 4, 8, 8, dtype=dtype, requires_grad=True)
    before = x.detach().clone()
    sample = SOLVERS[name](noise_fn, x, SCHEDULE, 5)
    assert sample.dtype == dtype
    assert not sample.requires_grad
    assert torch.equal(x.detach(), before)


def solve(name: SolverName, **changes: Any) -> None:
    arguments = {"noise_fn": with_class, "x": X, "schedule": SCHEDULE, "steps": 3} | changes
    SOLVERS[name](**arguments)


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_named(name: SolverName) -> None:
    for changes, argument in (
        ({"steps": 0}, "steps"),
        ({"steps": 2.0}, "steps"),
        ({"steps": True}, "steps"),
        ({"spacing": "even"}, "spacing"),
        ({"clip": (1.0, -1.0)}, "clip"),
        ({"x": X.long()}, "x"),
        ({"noise_fn": lambda x, t: x[:1]}, "noise_fn"),
    ):
        with pytest.raises(ValueError, match=rf"^{argument}: (got|returned) .*expected"):
            solve(name, **changes)
    with pytest.raises(ValueError, match=r"^order: got 4, expected 1, 2 or 3"):
        dpm_solver_multistep(with_class, X, SCHEDULE, 3, order=4)  # type: ignore[arg-type]
