"""Our solvers as a scheduler of diffusers."""

from functools import partial
from typing import Any, get_args

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dimr_fast.diffusion import (
    SOLVERS,
    DiscreteSchedule,
    Schedule,
    ScheduleName,
    SolverName,
    SolverState,
    SolverStep,
    Spacing,
    noise_schedule,
    solver_plan,
)
from dimr_fast.utils.validation import require

TRAIN_STEPS = DiscreteSchedule.num_steps
"""Steps that diffusers divides time in: its timestep n - 1 is our time n/1000."""


class DiMRScheduler(SchedulerMixin, ConfigMixin):
    """A solver of `dimr_fast.diffusion.SOLVERS`, one network evaluation for each timestep.

    `schedule` is the noise schedule that the model was trained with. `solver` and `spacing` are
    those of `SamplerConfig`; `clip` is the range that every predicted image is clipped to, or None.
    Timesteps are numbers in -1..999 with fractions: `1000·t - 1` for the time t in 0..1.

    The configuration also has what other schedulers need to know about the noise schedule:
    `DDIMScheduler.from_config(pipe.scheduler.config)` makes one that fits the model.

    Raises ValueError for another schedule, solver, spacing or clip.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        *,
        schedule: ScheduleName,
        solver: SolverName = "dpm++2m",
        spacing: Spacing = "log_snr",
        clip: tuple[float, float] | None = None,
    ) -> None:
        names = get_args(ScheduleName)
        require(schedule in names, "schedule", schedule, f"one of {', '.join(names)}")
        require(solver in SOLVERS, "solver", solver, f"one of {', '.join(SOLVERS)}")
        names = get_args(Spacing)
        require(spacing in names, "spacing", spacing, f"one of {', '.join(names)}")
        ordered = clip is None or clip[0] < clip[1]
        require(ordered, "clip", clip, "a lower and a higher number, or None")
        self._clip = None if clip is None else (clip[0], clip[1])
        self._schedule = noise_schedule(schedule)
        # Registered here, they do not count as defaults, which from_config would not pass on.
        self.register_to_config(**_for_other_schedulers(schedule))
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0, dtype=torch.float64)
        self._start([])

    @classmethod
    def extract_init_dict(
        cls, config_dict: dict[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Split a configuration as every class of diffusers does.

        Leave out what follows from the schedule: diffusers would warn that it is ignored.
        """
        implied: dict[str, Any] = {}
        if config_dict.get("schedule") in get_args(ScheduleName):
            implied = _for_other_schedulers(config_dict["schedule"])
        given = {n: v for n, v in config_dict.items() if n not in implied or v != implied[n]}
        return super().extract_init_dict(given, **kwargs)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Plan a new sample of that many network evaluations; `timesteps` are float64 on `device`.

        Raises ValueError if the number is no whole number of at least 1.
        """
        config: Any = self.config
        plan = solver_plan(config.solver, self._schedule, num_inference_steps, config.spacing)
        self.num_inference_steps = num_inference_steps
        times = torch.tensor([step.time for step in plan], dtype=torch.float64)
        self.timesteps = (TRAIN_STEPS * times - 1).to(device)
        self._start(plan)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample as it is: it is the network's input."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Return the state after the next step, from the noise predicted in `sample`.

        Steps are taken in the order of `timesteps`; `timestep` is not looked at. `generator` draws
        the noise of the solver euler-maruyama. Raises ValueError after the last step.
        """
        step = next(self._steps, None)
        if step is None:
            raise ValueError(
                f"timestep: got {timestep} after the last step, expected set_timesteps before it"
            )
        draw = partial(
            randn_tensor, sample.shape, generator, device=sample.device, dtype=torch.float32
        )
        sample = self._state.advance(step, sample, model_output, self._clip, draw)
        return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)

    def _start(self, plan: list[SolverStep]) -> None:
        self._steps, self._state = iter(plan), SolverState()


def time_of(timestep: Tensor) -> Tensor:
    """Return the time in 0..1 of a timestep of diffusers, any real dtype: float32 of its shape."""
    return ((timestep.double() + 1) / TRAIN_STEPS).float()


def alphas_cumprod(schedule: Schedule) -> Tensor:
    """Return `ᾱ = α²` at the times n/1000 for n = 1..1000, float64, as diffusers names it."""
    times = range(1, TRAIN_STEPS + 1)
    log_alphas = [schedule.log_alpha(n / TRAIN_STEPS) for n in times]
    return (2 * torch.tensor(log_alphas, dtype=torch.float64)).exp()


def _for_other_schedulers(name: ScheduleName) -> dict[str, Any]:
    """Return what diffusers' schedulers need to know about a noise schedule, as they name it."""
    known = {
        "num_train_timesteps": TRAIN_STEPS,
        "prediction_type": "epsilon",
        "timestep_spacing": "trailing",  # the first timestep is 999, which is noise
        "clip_sample": False,
    }
    if name == "discrete":
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        return known | betas
    kept = alphas_cumprod(noise_schedule(name))
    before = torch.cat([torch.ones(1, dtype=kept.dtype), kept[:-1]])
    return known | {"trained_betas": (1 - kept / before).tolist()}
