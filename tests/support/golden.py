"""The published model's own numbers: its parameters, inputs, outputs, loss and gradients."""

import json
from types import SimpleNamespace

from safetensors import safe_open
from torch import Tensor

from tests.support.paths import FILES

CASES = ("two_branch_tdrms", "two_branch_tdln", "two_branch_rms", "three_branch_tdrms")


class Golden:
    """One model file: its configuration as a published object, inputs, outputs, gradients."""

    def __init__(self, case: str) -> None:
        with safe_open(FILES / f"{case}.safetensors", "pt") as file:
            values = json.loads(file.metadata()["config"])
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.loss_coeffs = values.pop("loss_coeffs")
        stages = [SimpleNamespace(**stage) for stage in values.pop("stages")]
        self.config = SimpleNamespace(**values, block_grad_to_lowres=False, stage_configs=stages)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below a prefix, by the rest of their names."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest expected value."""
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max())
