"""Earlier place of `TrainConfig`, which scripts import from here; it is `dimr_fast.training`'s."""

from dimr_fast.training.config import TrainConfig, shipped_recipes

__all__ = ["TrainConfig", "shipped_recipes"]
