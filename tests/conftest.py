"""Where there is no GPU, Triton's kernels are interpreted; nothing depends on earlier runs."""

import os
from collections.abc import Iterator
from importlib import metadata

# Processes side by side (pytest -n) share the cores: threads that wait for one another on a core
# that is taken cost many times the work. Read when torch is imported.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

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
from tests.support.versions import forget_versions

# The same examples each time: errors are compared with another rounding error, which by chance can
# be nearly nothing, and the same code should get the same verdict.
settings.register_profile("same examples", derandomize=True, deadline=None)
settings.load_profile("same examples")


PROCESSORS = {
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "AVX-512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX-512 with BF16": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    },
    "AMX": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"},
}
"""What limits PyTorch and oneDNN to the instructions of an instruction set of the CPU library."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--processor",
        choices=PROCESSORS,
        help="run as on a processor that has no more than these instructions",
    )


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--processor")
    if name is None:
        return
    # PyTorch and oneDNN read them at their first operation.
    os.environ |= PROCESSORS[name]
    if _extension.why_not("cpu") is None and not _extension.use_instruction_set(name):
        raise pytest.UsageError(f"--processor: this processor has no {name}")


@pytest.fixture
def invented_versions(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Versions to report instead of those of the installed packages; the others stay theirs."""
    invented: dict[str, str] = {}
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: invented.get(name) or real(name))
    forget_versions()
    yield invented
    forget_versions()


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
