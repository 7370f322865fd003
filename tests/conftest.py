"""Where there is no GPU, Triton's kernels are interpreted; nothing depends on earlier runs."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Read when a kernel's module is imported, so it has to be there before any test runs.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Inductor's cache does not notice that an operator's shape rule has changed since.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

# Importing it may import Triton, which reads the environment.
from dimr_fast import _extension

# The same examples each time: errors are compared with another rounding error, which by chance can
# be nearly nothing, and the same code should get the same verdict.
settings.register_profile("same examples", derandomize=True, deadline=None)
settings.load_profile("same examples")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN: an output that a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=_extension.INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each of the instruction sets that the CPU library is compiled for, in use."""
    before = _extension.instruction_set()
    if not _extension.use_instruction_set(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    _extension.use_instruction_set(before)
