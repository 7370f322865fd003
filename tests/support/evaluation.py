"""Small evaluations and a feature network that needs no weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dimr_fast.evaluation import EvaluateConfig


class Colours(torch.nn.Module):
    """A feature network without weights: mean and standard deviation of each colour.

    `calls` counts its calls.
    """

    name = "colours"
    input_size = 16
    resize = "none"
    weights_hash = "0"
    packages = ()

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        pixels = images.float().flatten(2)
        return torch.cat([pixels.mean(2), pixels.std(2)], 1)


def small_evaluation(folder: Path, reference: Path | str, **changes: Any) -> EvaluateConfig:
    """Return an evaluation that writes its report and its cache below `folder`."""
    values: dict[str, Any] = {
        "reference": str(reference),
        "output": folder / "out",
        "cache": folder / "cache",
        "device": "cpu",
    }
    return EvaluateConfig(**(values | changes))
