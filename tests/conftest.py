"""Where there is no GPU, Triton's kernels run in its interpreter."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel's module is imported, so it has to be there before any test runs.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN: an output that a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
