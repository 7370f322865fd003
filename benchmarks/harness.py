"""What every benchmark does: choose devices, check before timing, describe the row."""

from typing import Any

import pytest
import torch

from dimr_fast.ops import OPERATORS

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def usable(operator: str, implementation: str, x: torch.Tensor) -> None:
    """Skip the row, with the reason, where the implementation cannot run on `x`."""
    reason = OPERATORS[operator].why_not(implementation, x)
    if reason is not None:
        pytest.skip(f"{implementation}: {reason}")


def check_close(actual: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor) -> None:
    """A wrong kernel is not timed: its error is at most twice that of `reference`, in the same
    dtype, plus one rounding step of the output's scale; `exact` is the reference in fp64.
    """
    step = torch.finfo(actual.dtype).eps * exact.abs().max()
    allowed = 2 * (reference.double() - exact).abs().max() + step
    assert (actual.detach().double() - exact).abs().max() <= allowed


def describe(operator: str, implementation: str, x: torch.Tensor) -> dict[str, Any]:
    """What a results file says of a row, beside its times."""
    return {
        "operator": operator,
        "implementation": implementation,
        "shape": list(x.shape),
        "dtype": name(x.dtype),
        "device": torch.cuda.get_device_name(x.device) if x.is_cuda else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
