"""Count the kernels that a forward pass launches, without a GPU.

    python -m benchmarks.model.launches

writes `results/launches.json`. The model runs on the meta device in bfloat16 at batch 1. A torch
operator that computes counts as one launch, a view or an allocation as none, and each of our Triton
operators counts the launches of its launcher. A library call that starts several kernels, as a
convolution may, still counts as one.
"""

import importlib
from collections import Counter
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from benchmarks.utils import machine
from benchmarks.utils.files import RESULTS
from dimr_fast import DiMR
from dimr_fast.utils.files import write_json

RESULT = RESULTS / "launches.json"
PUBLISHED = {"DiMR-XL/2R": 2936, "DiMR-G/2R": 3857, "DiMR-XL/3R": 3682}
"""Launches of the published code itself, counted once."""


class _LaunchCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "dimr_fast" and func._overloadname == "triton":
            return self._launch(*name.rsplit("_", 1), args)
        result = func(*args, **(kwargs or {}))
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        computes = isinstance(result, torch.Tensor | tuple | list) and not view
        if computes and not any(word in name for word in ("empty", "detach", "_unsafe_view")):
            self.launches[name] += 1
        return result

    def _launch(self, operator: str, direction: str, args: Any) -> Any:
        """Call an operator's launcher with kernels replaced by a counter."""

        def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
            self.launches[operator] += 1

        launcher = getattr(
            importlib.import_module(f"dimr_fast.kernels.{operator}"), f"launch_{direction}"
        )
        # Inside this mode again, so that torch operators called by the launcher count too.
        kernels = [mock.patch.object(k, "run", run) for k in (JITFunction, InterpretedFunction)]
        with self, kernels[0], kernels[1]:
            return launcher(*args)


def count(preset: str, implementation: str) -> Counter[str]:
    """Return the launches of a forward pass of a preset at batch 1, by operator."""
    with torch.device("meta"):
        model = DiMR.from_preset(preset).to(torch.bfloat16).set_implementation(implementation)
        config = model.config
        x = torch.empty(1, config.channels, *config.image_size, dtype=torch.bfloat16)
        log_snr, y = torch.empty(1), torch.empty(1, dtype=torch.int64)
    with torch.no_grad(), _LaunchCounter() as counted:
        model(x, log_snr=log_snr, y=y)
    return counted.launches


def report() -> dict[str, Any]:
    """Return launches of the published code, the reference and Triton for each preset."""
    presets = {
        preset: {
            "published": published,
            **{
                implementation: dict(count(preset, implementation).most_common())
                for implementation in ("reference", "triton")
            },
        }
        for preset, published in PUBLISHED.items()
    }
    return {**machine.description(), "triton": triton.__version__, "presets": presets}


if __name__ == "__main__":
    write_json(RESULT, report())
