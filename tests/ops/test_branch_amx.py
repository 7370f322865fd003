"""The products of a branch by AMX, emulated: few processors have these instructions."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

OPTIONS = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-psabi", "-I", str(ROOT / "csrc")]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the kernel once with emulated AMX and once without any vector instructions."""
    compiler = os.environ.get("CXX", "g++")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("AMX is for x86-64")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler: {compiler}")
    output = tmp_path_factory.mktemp("amx") / "linear"
    plain = output.with_suffix(".o")
    source = ROOT / "csrc" / "cpu" / "kernels" / "linear.cpp"
    defined = "-DDIMR_FAST_INSTRUCTION_SET=portable"
    driver = ROOT / "tests" / "amx_emulation" / "linear.cpp"
    for command in (
        [compiler, *OPTIONS, defined, "-c", source, "-o", plain],
        [compiler, *OPTIONS, driver, plain, "-o", output],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    return output


def test_tiles_compute_what_vectors_compute(program: Path) -> None:
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    cases = [line.split() for line in result.stdout.splitlines()]
    assert len(cases) == 2 * 5 * 6 * 4 * 2
    for *case, gated, difference, largest in cases:
        assert float(difference) == 0.0, (case, gated)
        # The GELU of a large negative number is zero.
        assert float(largest) > 0 or gated == "1", case
