"""The diffusion process: schedule, training objective, guidance and sampler. Knows no model."""

from dimr_fast.diffusion.guidance import (
    ConstantGuidance,
    Guidance,
    ModelFn,
    PowerCosineGuidance,
    guided,
)
from dimr_fast.diffusion.loss import multi_scale_loss, pool_noise
from dimr_fast.diffusion.schedule import DiscreteSchedule, time_condition
from dimr_fast.diffusion.solvers import NoiseFn, dpm_solver_singlestep

__all__ = [
    "ConstantGuidance",
    "DiscreteSchedule",
    "Guidance",
    "ModelFn",
    "NoiseFn",
    "PowerCosineGuidance",
    "dpm_solver_singlestep",
    "guided",
    "multi_scale_loss",
    "pool_noise",
    "time_condition",
]
