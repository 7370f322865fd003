"""Every solver against exact solutions, and where diffusers has the same one, against that."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch

from dimr_fast.diffusion import (
    SOLVERS,
    DiscreteSchedule,
    SolverName,
    Spacing,
    dpm_solver_multistep,
    dpm_solver_singlestep,
)

SCHEDULE = DiscreteSchedule()
NAMES = list(SOLVERS)
ORDERS = {"dpm++": 3, "dpm++2m": 2, "dpm++3m": 3, "ddim": 1, "heun": 2}
X = torch.linspace(-2, 2, 9, dtype=torch.float64)


class SmoothSchedule:
    """Without the discrete one's kinks, which would limit every order, and away from t = 0.

    At t = 1 an input is all but pure noise (α = 4e-6), so that the first steps of a multistep
    solver, of lower order, cost nothing, as on a schedule that is trained with.
    """

    num_steps = 4

    def log_alpha(self, t: float) -> float:
        return -12.5 * t * t

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        return math.exp(self.log_alpha(t)), math.sqrt(-math.expm1(2 * self.log_alpha(t)))

    def half_log_snr(self, t: float) -> float:
        alpha, sigma = self.alpha_sigma(t)
        return math.log(alpha / sigma)


class GaussianProblem:
    """Data from N(mean, std²), where the noise prediction and the solution are known exactly."""

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
        """From t = 1 to the schedule's end."""
        end = 1 / self.schedule.num_steps
        standard = (x - self.schedule.alpha_sigma(1.0)[0] * self.mean) / self.marginal_std(1.0)
        return self.schedule.alpha_sigma(end)[0] * self.mean + self.marginal_std(end) * standard

    def error(self, name: SolverName, steps: int, spacing: Spacing = "time") -> float:
        sample = SOLVERS[name](self.noise_fn, X, self.schedule, steps, spacing=spacing)
        return (sample - self.solution(X)).abs().max().item()


def squashed(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x * (0.5 + t))


def test_the_names_are_those_of_the_solvers() -> None:
    assert list(get_args(SolverName)) == NAMES == list(ORDERS)
    assert SOLVERS["dpm++"] is dpm_solver_singlestep


@pytest.mark.parametrize("name", NAMES)
def test_order_of_convergence(name: SolverName) -> None:
    """Doubling the steps divides the error by 2^order; 3k + 2 single steps end in order 2."""
    problem = GaussianProblem(SmoothSchedule())
    errors = [problem.error(name, steps) for steps in (50, 98, 194, 386)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders[-1] == pytest.approx(ORDERS[name], abs=0.1), (errors, orders)


@pytest.mark.parametrize("name", NAMES)
def test_samples_approach_the_exact_solution(name: SolverName) -> None:
    """On the discrete schedule, to its end; uniform in λ with fewer steps than in time."""
    problem = GaussianProblem(SCHEDULE)
    errors = [problem.error(name, steps) for steps in (20, 1280)]
    assert errors[1] < errors[0] / 40
    assert problem.error(name, 25, "log_snr") < 0.6 * problem.error(name, 25)
    finer = [problem.error(name, steps, "log_snr") for steps in (20, 320)]
    assert finer[1] < finer[0] / 12 ** min(ORDERS[name], 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 14, 15, 16])
def test_steps_are_network_evaluations(name: SolverName, steps: int) -> None:
    times: list[float] = []
    done: list[int] = []

    def noise_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert t.ndim == 0
        assert t.device.type == "cpu"
        times.append(t.item())
        return squashed(x, t)

    SOLVERS[name](noise_fn, X, SCHEDULE, steps, progress=lambda: done.append(len(times)))
    assert times[0] == 1
    assert times == sorted(times, reverse=True)
    assert done == list(range(1, steps + 1))


@pytest.mark.parametrize("name", NAMES)
def test_clipping_bounds_the_sample_and_a_wide_range_changes_nothing(name: SolverName) -> None:
    plain = SOLVERS[name](squashed, X, SCHEDULE, 12)
    bound = plain.abs().max().item() / 2
    clipped = SOLVERS[name](squashed, X, SCHEDULE, 12, clip=(-bound, bound))
    # Above the bound is what extrapolation between predictions adds, and the noise of t = 1/1000.
    assert clipped.abs().max() < 1.5 * bound
    wide = SOLVERS[name](squashed, X, SCHEDULE, 12, clip=(-1e6, 1e6))
    assert torch.equal(wide, plain)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name: SolverName) -> None:
    """Tensors without values cannot be waited for."""
    x = torch.empty(2, 4, 8, 8, device="meta")
    noise_fn = lambda x, t: x * t.to(x.device)  # noqa: E731
    assert SOLVERS[name](noise_fn, x, SCHEDULE, 7, clip=(-1.0, 1.0)).shape == x.shape


@pytest.mark.parametrize("name", NAMES)
def test_the_state_keeps_its_dtype_its_input_and_no_gradient(name: SolverName) -> None:
    def noise_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert (x.dtype, t.dtype) == (torch.bfloat16, torch.float32)
        return squashed(x, t).float()

    x = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    before = x.detach().clone()
    sample = SOLVERS[name](noise_fn, x, SCHEDULE, 5)
    assert sample.dtype == torch.bfloat16
    assert not sample.requires_grad
    assert torch.equal(x.detach(), before)


def solve(name: SolverName, **changes: Any) -> None:
    arguments = {"noise_fn": squashed, "x": X, "schedule": SCHEDULE, "steps": 3} | changes
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
        dpm_solver_multistep(squashed, X, SCHEDULE, 3, order=4)  # type: ignore[arg-type]


# Against diffusers, whose steps are whole: 999 intervals in all, of which `steps` is a divisor.


def scheduler(kind: str, **settings: Any) -> Any:
    """One of diffusers' schedulers on our betas, which it keeps in float32."""
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers")
    return getattr(diffusers, kind)(trained_betas=SCHEDULE.betas.numpy(), **settings)


def whole_steps(steps: int) -> list[int]:
    """Our grid as diffusers counts: step n of 1..1000 is its timestep n − 1."""
    return list(range(999, 0, -999 // steps))


def drawn_by(theirs: Any, timesteps: list[int], noise: Callable[[Any, Any], Any]) -> torch.Tensor:
    x = X.float()
    for timestep in timesteps:
        x = theirs.step(noise(x, torch.tensor((timestep + 1) / 1000)), timestep, x).prev_sample
    return x


def halved_curvature_made_whole() -> Any:
    """diffusers' third order with the whole curvature of the parabola through its predictions.

    Its D2 is h² times the second divided difference, half the second derivative that it multiplies
    with the integral of s²/2.
    """
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers")

    class Whole(diffusers.DPMSolverMultistepScheduler):  # type: ignore[misc, name-defined]
        def multistep_dpm_solver_third_order_update(self, images: Any, **given: Any) -> Any:
            halved = super().multistep_dpm_solver_third_order_update(images, **given)
            sigmas = self.sigmas[self.step_index - 2 : self.step_index + 2].double()
            h1, h0, h = (-sigmas.log()).diff().tolist()
            second, before, latest = images
            slopes = (latest - before) / h0, (before - second) / h1
            curvature = (slopes[0] - slopes[1]) / (h0 + h1)
            alpha = 1 / math.hypot(1, sigmas[-1].item())
            return halved + alpha * (h * h / 2 - h - math.expm1(-h)) * curvature

    return Whole


@pytest.mark.parametrize("steps", [9, 27])
@pytest.mark.parametrize("order", [2, 3])
def test_multistep_draws_as_diffusers(order: int, steps: int) -> None:
    settings: dict[str, Any] = {
        "solver_order": order,
        "algorithm_type": "dpmsolver++",
        "final_sigmas_type": "sigma_min",
    }
    theirs = scheduler("DPMSolverMultistepScheduler", **settings)
    if order == 3:
        theirs = halved_curvature_made_whole()(trained_betas=SCHEDULE.betas.numpy(), **settings)
    theirs.set_timesteps(timesteps=whole_steps(steps))
    expected = drawn_by(theirs, whole_steps(steps), squashed)
    name: SolverName = "dpm++2m" if order == 2 else "dpm++3m"
    torch.testing.assert_close(
        SOLVERS[name](squashed, X, SCHEDULE, steps).float(), expected, rtol=3e-5, atol=3e-5
    )


@pytest.mark.parametrize("steps", [27, 37])
def test_ddim_draws_as_diffusers(steps: int) -> None:
    theirs = scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=False)
    theirs.set_timesteps(steps)
    expected = drawn_by(theirs, whole_steps(steps), squashed)
    torch.testing.assert_close(
        SOLVERS["ddim"](squashed, X, SCHEDULE, steps).float(), expected, rtol=3e-5, atol=3e-5
    )


def test_heun_draws_as_diffusers() -> None:
    """diffusers' state is x/α; its last step, to no noise at all, is left out."""
    theirs = scheduler("HeunDiscreteScheduler")
    steps = [*whole_steps(27), 0]
    theirs.set_timesteps(timesteps=steps)
    x = X.float() / SCHEDULE.alpha_sigma(1.0)[0]
    for timestep in theirs.timesteps[: 2 * 27]:
        t = (timestep.item() + 1) / 1000
        noise = squashed(x * SCHEDULE.alpha_sigma(t)[0], torch.tensor(t))
        x = theirs.step(noise, timestep, x).prev_sample
    expected = x * SCHEDULE.alpha_sigma(0.001)[0]
    torch.testing.assert_close(
        SOLVERS["heun"](squashed, X, SCHEDULE, 54).float(), expected, rtol=3e-5, atol=3e-5
    )
