"""The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer.

It is built again with them. Every operator runs on its edge shapes in every instruction set, then
on random bad inputs; see `tests/support/sanitized.py`.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.support.package_copy import copy_package
from tests.support.paths import ROOT

FLAGS = [
    "-O0",  # optimising vector code with these checks takes the compiler minutes
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
]
BAD_CALLS = 1000

PLANTED = """
extern "C" float read(const float* from, long index) { return from[index]; }
extern "C" int increment(int value) { return value + 1; }
"""


def runtimes() -> list[Path]:
    """What has to be preloaded: libstdc++ too, or what it throws is not intercepted."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = []
    for name in names:
        command = ["g++", f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        # The compiler repeats the bare name where it does not know the file.
        found += [Path(path).resolve()] if Path(path).is_file() else []
    return found if len(found) == len(names) else []


def why_not() -> str | None:
    if sys.platform != "linux":
        return "the sanitizers are preloaded as on Linux"
    for program in ("g++", "cmake", "ninja"):
        if shutil.which(program) is None:
            return f"no {program}"
    return None if runtimes() else "g++ has no libasan and libubsan"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=f"{why_not()}"),
]


def run(
    *arguments: object, folder: Path = ROOT, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder` with the sanitizers preloaded."""
    options = {
        # Python leaks on purpose; a size that no memory serves is an error, as without sanitizers.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=1024",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "LD_PRELOAD": " ".join(map(str, runtimes())),
    }
    environ = {name: value for name, value in environment.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environ | options,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ("print(library.read(x.data_ptr(), 4))", None),
        ("library.read(x.data_ptr(), 5)", "heap-buffer-overflow"),
        ("library.read(x.data_ptr(), -1)", "heap-buffer-overflow"),
        ("p = x.data_ptr(); del x; library.read(p, 0)", "heap-use-after-free"),
        ("library.increment(2**31 - 1)", "signed integer overflow"),
    ],
)
def test_planted_errors_are_caught(tmp_path, wrong, found):
    source, library = tmp_path / "planted.cpp", tmp_path / "planted.so"
    source.write_text(PLANTED)
    subprocess.run(["g++", *FLAGS, "-shared", "-fPIC", source, "-o", library], check=True)
    code = f"""
import ctypes, torch
library = ctypes.CDLL({str(library)!r})
library.read.argtypes = [ctypes.c_void_p, ctypes.c_long]
x = torch.zeros(5)
{wrong}
"""
    done = run("-c", code)
    assert (done.returncode == 0) == (found is None), done.stderr[-3000:]
    assert found is None or found in done.stderr


def test_the_cpu_library_has_no_findings(tmp_path):
    definitions = {
        "TORCH_ROOT": Path(torch.__file__).parent,
        "CMAKE_CXX_COMPILER": "g++",
        "CMAKE_CXX_FLAGS": " ".join(FLAGS),
    }
    arguments = [f"-D{name}={value}" for name, value in definitions.items()]
    build = tmp_path / "build"
    for command in (
        ["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *arguments],
        ["cmake", "--build", build, "--target", "dimr_fast_cpu", "-j", "2"],
    ):
        made = subprocess.run(command, capture_output=True, text=True)
        assert made.returncode == 0, (made.stdout + made.stderr)[-3000:]
    assert b"__asan_report_load" in (build / "libdimr_fast_cpu.so").read_bytes()

    environment = copy_package(tmp_path / "package", libraries=build)
    words = ["-m", "tests.support.sanitized", BAD_CALLS]
    done = run(*words, folder=tmp_path / "package", environment=environment)
    last = done.stdout[-2000:].splitlines()[-1:]
    assert done.returncode == 0, f"exit {done.returncode} at {last}:\n{done.stderr[-6000:]}"
    assert last[0].startswith("bad inputs: ")
    assert "\nedges: " in done.stdout
