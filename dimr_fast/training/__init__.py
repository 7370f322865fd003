"""Train a model on labelled images or latents, on one process or many.

`python -m dimr_fast.training` is `dimr-fast train`, for `accelerate launch` and torchrun.
"""

from dimr_fast.training.config import TrainConfig
from dimr_fast.training.distillation import distillation_config
from dimr_fast.training.run import CHECKPOINT, CONFIG, FILES, TrainSummary, train

__all__ = [
    "CHECKPOINT",
    "CONFIG",
    "FILES",
    "TrainConfig",
    "TrainSummary",
    "distillation_config",
    "train",
]
