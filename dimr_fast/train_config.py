"""Re-export `TrainConfig` under its old import path; new code uses `dimr_fast.training`."""

from dimr_fast.training.config import TrainConfig, shipped_recipes

__all__ = ["TrainConfig", "shipped_recipes"]
