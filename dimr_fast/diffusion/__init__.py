"""The diffusion process: schedule, training objective, guidance and solvers. Knows no model."""

from dimr_fast.diffusion.distillation import (
    Intervals,
    distillation_loss,
    draw_intervals,
    teacher_target,
)
from dimr_fast.diffusion.guidance import (
    Autoguided,
    ConstantGuidance,
    Guidance,
    ModelFn,
    PowerCosineGuidance,
    guided,
)
from dimr_fast.diffusion.loss import multi_scale_loss, pool_noise
from dimr_fast.diffusion.schedule import (
    VPSDE,
    DiscreteSchedule,
    Schedule,
    ScheduleName,
    noise_schedule,
    time_condition,
)
from dimr_fast.diffusion.solvers import (
    SOLVERS,
    NoiseFn,
    Solver,
    SolverName,
    SolverState,
    SolverStep,
    Spacing,
    dpm_solver_multistep,
    dpm_solver_singlestep,
    euler,
    euler_maruyama,
    heun,
    solver_plan,
)

__all__ = [
    "SOLVERS",
    "VPSDE",
    "Autoguided",
    "ConstantGuidance",
    "DiscreteSchedule",
    "Guidance",
    "Intervals",
    "ModelFn",
    "NoiseFn",
    "PowerCosineGuidance",
    "Schedule",
    "ScheduleName",
    "Solver",
    "SolverName",
    "SolverState",
    "SolverStep",
    "Spacing",
    "distillation_loss",
    "dpm_solver_multistep",
    "dpm_solver_singlestep",
    "draw_intervals",
    "euler",
    "euler_maruyama",
    "guided",
    "heun",
    "multi_scale_loss",
    "noise_schedule",
    "pool_noise",
    "solver_plan",
    "teacher_target",
    "time_condition",
]
