"""The diffusion process: schedule, training objective, guidance and solvers. Knows no model."""

from dimr_fast.diffusion.guidance import (
    ConstantGuidance,
    Guidance,
    ModelFn,
    PowerCosineGuidance,
    guided,
)
from dimr_fast.diffusion.loss import multi_scale_loss, pool_noise
from dimr_fast.diffusion.schedule import DiscreteSchedule, time_condition
from dimr_fast.diffusion.solvers import (
    SOLVERS,
    NoiseFn,
    Solver,
    SolverName,
    Spacing,
    dpm_solver_multistep,
    dpm_solver_singlestep,
    heun,
)

__all__ = [
    "SOLVERS",
    "ConstantGuidance",
    "DiscreteSchedule",
    "Guidance",
    "ModelFn",
    "NoiseFn",
    "PowerCosineGuidance",
    "Solver",
    "SolverName",
    "Spacing",
    "dpm_solver_multistep",
    "dpm_solver_singlestep",
    "guided",
    "heun",
    "multi_scale_loss",
    "pool_noise",
    "time_condition",
]
