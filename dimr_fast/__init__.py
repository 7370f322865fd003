"""DiMR, fast: a multi-resolution diffusion model with time-dependent layer normalisation."""

from dimr_fast.config import PRESETS, BranchConfig, DiMRConfig
from dimr_fast.inference import optimize_for_inference
from dimr_fast.model import DiMR

__all__ = ["PRESETS", "BranchConfig", "DiMR", "DiMRConfig", "optimize_for_inference"]
__version__ = "0.1.0"
