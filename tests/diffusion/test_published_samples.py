"""Solvers against the published samples, and where diffusers has the same solver, against that.

Steps of diffusers are whole numbers: there are 999 intervals, and `steps` divides them.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dimr_fast.diffusion import (
    SOLVERS,
    ConstantGuidance,
    PowerCosineGuidance,
    SolverName,
    dpm_solver_singlestep,
    guided,
)
from tests.support.diffusion import (
    GOLDEN,
    SCHEDULE,
    ClassModel,
    X,
    with_class,
)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("steps", [5, 6, 10, 25, 50, 250])
def test_sampler_draws_the_published_samples(steps: int) -> None:
    sample = dpm_solver_singlestep(with_class, GOLDEN["sampler/z_init"], SCHEDULE, steps)
    assert sample.dtype == torch.float32
    assert relative_error(sample, GOLDEN[f"sampler/plain/{steps}"]) < 2e-6


@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        ("cfg_const_0.4", ConstantGuidance(0.4)),
        ("cfg_power_cosine_4.0_2.0", PowerCosineGuidance(4.0, 2.0)),
    ],
)
def test_guided_sampler_draws_the_published_samples(
    name: str, guidance: ConstantGuidance | PowerCosineGuidance
) -> None:
    model = ClassModel()
    z = GOLDEN["sampler/z_init"]
    noise_fn = guided(model, torch.ones(len(z), dtype=torch.long), 0, guidance)
    sample = dpm_solver_singlestep(noise_fn, z, SCHEDULE, 25)
    assert relative_error(sample, GOLDEN[f"sampler/{name}/25"]) < 2e-6
    assert len(model.calls) == 25
    assert all(len(x) == 2 * len(z) for x, _, _ in model.calls)


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
    expected = drawn_by(theirs, whole_steps(steps), with_class)
    name: SolverName = "dpm++2m" if order == 2 else "dpm++3m"
    torch.testing.assert_close(
        SOLVERS[name](with_class, X, SCHEDULE, steps).float(), expected, rtol=3e-5, atol=3e-5
    )


@pytest.mark.parametrize("steps", [27, 37])
def test_ddim_draws_as_diffusers(steps: int) -> None:
    theirs = scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=False)
    theirs.set_timesteps(steps)
    expected = drawn_by(theirs, whole_steps(steps), with_class)
    torch.testing.assert_close(
        SOLVERS["ddim"](with_class, X, SCHEDULE, steps).float(), expected, rtol=3e-5, atol=3e-5
    )


def test_heun_draws_as_diffusers() -> None:
    """diffusers' state is x/α; its last step, to no noise at all, is left out."""
    theirs = scheduler("HeunDiscreteScheduler")
    steps = [*whole_steps(27), 0]
    theirs.set_timesteps(timesteps=steps)
    x = X.float() / SCHEDULE.alpha_sigma(1.0)[0]
    for timestep in theirs.timesteps[: 2 * 27]:
        t = (timestep.item() + 1) / 1000
        noise = with_class(x * SCHEDULE.alpha_sigma(t)[0], torch.tensor(t))
        x = theirs.step(noise, timestep, x).prev_sample
    expected = x * SCHEDULE.alpha_sigma(0.001)[0]
    torch.testing.assert_close(
        SOLVERS["heun"](with_class, X, SCHEDULE, 54).float(), expected, rtol=3e-5, atol=3e-5
    )
