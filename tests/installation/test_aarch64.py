"""The portable kernels on aarch64: cross-compiled, and one of them run in an emulation of it."""

import shutil
import subprocess

import pytest

from tests.support.paths import ROOT

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LIBRARIES = "/usr/aarch64-linux-gnu"  # where Debian's cross compiler has them
KERNELS = ROOT / "csrc" / "cpu" / "kernels"
OPTIONS = ["-std=c++20", "-DDIMR_FAST_INSTRUCTION_SET=portable", "-I", ROOT / "csrc", "-Wno-psabi"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}"),
]


def compile_with(*arguments):
    done = subprocess.run([COMPILER, *OPTIONS, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("source", sorted(KERNELS.glob("*.cpp")), ids=lambda path: path.stem)
def test_the_kernels_compile(source):
    compile_with("-fsyntax-only", source)


@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"no {EMULATOR}")
def test_a_kernel_computes_what_double_precision_does(tmp_path):
    program = tmp_path / "gated_gelu"
    check = ROOT / "tests" / "aarch64" / "gated_gelu.cpp"
    compile_with("-O3", KERNELS / "gated_gelu.cpp", check, "-o", program)
    done = subprocess.run([EMULATOR, "-L", LIBRARIES, program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0 wrong\n"), done.stdout[-2000:] + done.stderr
