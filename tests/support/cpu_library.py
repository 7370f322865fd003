"""Helpers for the tests of the compiled CPU library."""

from collections.abc import Callable

import pytest
import torch

from dimr_fast import _extension
from tests.support.oracle import DEVICE

NO_CPU_LIBRARY = _extension.why_not("cpu") or (
    None if DEVICE == "cpu" else "tensors lie on the GPU"
)
needs_cpu = pytest.mark.skipif(NO_CPU_LIBRARY is not None, reason=f"cpu: {NO_CPU_LIBRARY}")
each_implementation = pytest.mark.parametrize(
    "implementation", ["triton", pytest.param("cpu", marks=needs_cpu)]
)


def on_threads(count: int, run: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """Return the result of `run` with `count` threads."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        return run()
    finally:
        torch.set_num_threads(before)
