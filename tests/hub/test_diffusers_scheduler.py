"""Our solvers as a scheduler of diffusers, and diffusers' schedulers on our models."""

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from dimr_fast.diffusion import SOLVERS, ScheduleName, SolverName, noise_schedule
from tests.support.diffusion import with_class
from tests.support.pipelines import LABELS, generators, published_pixels, tiny

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: hub)")
ours = pytest.importorskip("dimr_fast.diffusers", reason="needs diffusers (extra: hub)")

SCHEDULES = get_args(ScheduleName)


def drawn_in_steps(scheduler: Any, x: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Draw a sample in the loop of a diffusers pipeline."""
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps
    for timestep in scheduler.timesteps:
        noise = with_class(
            scheduler.scale_model_input(x, timestep), ((timestep + 1) / 1000).float()
        )
        x = scheduler.step(noise, timestep, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("steps", [1, 5, 9])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_draw_what_the_solver_draws(
    solver: SolverName, schedule: ScheduleName, steps: int
) -> None:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for spacing, clip in (("time", None), ("log_snr", (-1.0, 2.0))):
        scheduler = ours.DiMRScheduler(schedule=schedule, solver=solver, spacing=spacing, clip=clip)
        generator = torch.Generator().manual_seed(1)
        drawn = drawn_in_steps(scheduler, x, steps, generator)
        torch.manual_seed(1)
        whole = SOLVERS[solver](
            with_class, x, noise_schedule(schedule), steps, spacing=spacing, clip=clip
        )
        assert torch.equal(drawn, whole)


def test_a_step_after_the_last_and_bad_settings_are_refused() -> None:
    scheduler = ours.DiMRScheduler(schedule="discrete")
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"timestep: got 0.*expected set_timesteps"):
        scheduler.step(x, 0, x)
    for name, value in {"schedule": "x", "solver": "x", "spacing": "x", "clip": (1.0, 0.0)}.items():
        with pytest.raises(ValueError, match=f"{name}: got .*expected"):
            ours.DiMRScheduler(**{"schedule": "discrete", name: value})
    with pytest.raises(ValueError, match="steps: got 0, expected"):
        scheduler.set_timesteps(0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_follows_from_the_schedule_is_read_without_a_warning(
    schedule: ScheduleName, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("diffusers.configuration_utils")
    logger.addHandler(caplog.handler)  # diffusers' loggers do not propagate
    try:
        ours.DiMRScheduler(schedule=schedule).save_pretrained(tmp_path)
        ours.DiMRScheduler.from_pretrained(tmp_path)
        assert not caplog.records
        file = tmp_path / "scheduler_config.json"
        changed = json.loads(file.read_text()) | {"clip_sample": True}
        file.write_text(json.dumps(changed))
        ours.DiMRScheduler.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert "{'clip_sample': True} were passed to DiMRScheduler" in caplog.text


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_configurations_survive_files_and_other_schedulers(
    schedule: ScheduleName, tmp_path: Path
) -> None:
    scheduler = ours.DiMRScheduler(schedule=schedule, solver="heun", clip=(-1.5, 2.0))
    scheduler.save_pretrained(tmp_path)
    loaded = ours.DiMRScheduler.from_pretrained(tmp_path)
    ddim = diffusers.DDIMScheduler.from_config(loaded.config)
    again = ours.DiMRScheduler.from_config(ddim.config, spacing="time")
    for found, spacing in ((loaded, "log_snr"), (again, "time")):
        assert (found.config.schedule, found.config.solver) == (schedule, "heun")
        assert (tuple(found.config.clip), found.config.spacing) == ((-1.5, 2.0), spacing)
    assert not ddim.config.clip_sample


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_other_schedulers_get_the_noise_schedule(schedule: ScheduleName) -> None:
    config = ours.DiMRScheduler(schedule=schedule).config
    theirs = diffusers.DDIMScheduler.from_config(config).alphas_cumprod
    exact = noise_schedule(schedule)
    for timestep in (0, 1, 500, 999):
        alpha, _ = exact.alpha_sigma((timestep + 1) / 1000)
        assert theirs[timestep].item() == pytest.approx(alpha**2, rel=1e-4)


def test_dpm_solver_of_diffusers_draws_what_ours_draws() -> None:
    """Of 27 intervals of 37 timesteps, from 999 to 0."""
    transformer = ours.DiMRModel(tiny()).float()
    own = ours.DiMRScheduler(schedule="discrete", solver="dpm++2m", spacing="time")
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(
        own.config, timestep_spacing="linspace", final_sigmas_type="sigma_min"
    )
    drawn = [
        ours.DiMRPipeline(transformer, scheduler)(
            LABELS,
            guidance_scale=1.5,
            generator=generators(),
            num_inference_steps=27,
            output_type="latent",
        ).images
        for scheduler in (own, theirs)
    ]
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_the_condition_is_that_of_the_scheduler_s_noise(kind: str) -> None:
    """The condition of a VP-SDE model is log(α²/σ²), which diffusers' tables state, too."""
    transformer = ours.DiMRModel(published_pixels()).float()
    config = ours.DiMRScheduler(schedule="vp-sde").config
    scheduler = getattr(diffusers, kind).from_config(config)
    conditions: list[Tensor] = []
    transformer.register_forward_pre_hook(lambda _, given: conditions.append(given[1]))
    ours.DiMRPipeline(transformer, scheduler)(LABELS, num_inference_steps=10, output_type="np")
    kept = scheduler.alphas_cumprod[scheduler.timesteps.long()].double()
    torch.testing.assert_close(
        torch.cat(conditions).double(), (kept / (1 - kept)).log(), rtol=1e-3, atol=1e-3
    )


def drawn(name: ScheduleName, scheduler: Any, steps: int) -> Any:
    """Draw images with a tiny model of this noise schedule."""
    trained = tiny() if name == "discrete" else published_pixels()
    pipe = ours.DiMRPipeline(ours.DiMRModel(trained).float(), scheduler)
    return pipe(LABELS, generator=generators(), num_inference_steps=steps, output_type="np").images


@cache
def exact(name: ScheduleName) -> Any:
    """Return what many steps of our solver of order 3 draw."""
    return drawn(name, ours.DiMRScheduler(schedule=name, solver="dpm++3m"), 200)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "kind",
    [
        "DDIMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_schedulers_of_diffusers_come_near_the_exact_solution(
    kind: str, name: ScheduleName
) -> None:
    theirs = getattr(diffusers, kind).from_config(ours.DiMRScheduler(schedule=name).config)
    error = abs(drawn(name, theirs, 50) - exact(name)).mean()
    assert error < 0.03 * exact(name).std()


@pytest.mark.parametrize("kind", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_noise_of_a_step_comes_from_the_generator(kind: str) -> None:
    transformer = ours.DiMRModel(tiny()).float()
    config = ours.DiMRScheduler(schedule="discrete").config
    pipe = ours.DiMRPipeline(transformer, getattr(diffusers, kind).from_config(config))

    def draw(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return pipe(LABELS, generator=generator, num_inference_steps=5, output_type="latent").images

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("DDIMScheduler", {}, "of another noise schedule"),
        ("EulerDiscreteScheduler", {}, "of another noise schedule"),
        ("UniPCMultistepScheduler", {"prediction_type": "sample"}, "of prediction_type sample"),
        ("FlowMatchEulerDiscreteScheduler", {}, "of prediction_type None"),
        ("EDMEulerScheduler", {}, "of another noise schedule"),
    ],
)
def test_schedulers_that_do_not_fit_are_refused(
    kind: str, settings: dict[str, Any], message: str
) -> None:
    scheduler = getattr(diffusers, kind)(**settings)
    pipe = ours.DiMRPipeline(ours.DiMRModel(tiny()), scheduler)
    with pytest.raises(ValueError, match=f"scheduler: got '{kind} {message}', exp") as caught:
        pipe(LABELS)
    # The message says how to make one that fits, if that is possible.
    made = f"{kind}.from_config(DiMRScheduler(schedule='discrete').config)"
    possible = "alphas_cumprod" in vars(scheduler)
    assert (made if possible else "DDIMScheduler") in str(caught.value)


def test_clipping_that_changes_images_is_refused() -> None:
    config = ours.DiMRScheduler(schedule="discrete").config
    clipping = diffusers.DDIMScheduler.from_config(config, clip_sample=True)
    pipe = ours.DiMRPipeline(ours.DiMRModel(tiny()), clipping)
    with pytest.raises(ValueError, match=r"scheduler: got 'clip_sample to ±1.0'"):
        pipe(LABELS)
    wide = diffusers.DDIMScheduler.from_config(config, clip_sample=True, clip_sample_range=4.0)
    pipe.scheduler = wide
    assert len(pipe(LABELS, num_inference_steps=2).images) == len(LABELS)


def test_a_scheduler_of_another_model_is_refused() -> None:
    other = ours.DiMRScheduler(schedule="vp-sde")
    pipe = ours.DiMRPipeline(ours.DiMRModel(tiny()), other)
    with pytest.raises(ValueError, match=r"scheduler: got .*vp-sde.*the model's schedule discrete"):
        pipe(LABELS)
