"""The compiled libraries use only torch's stable C interface, that of the oldest torch.

The symbols that a library needs are in its symbol table. Allowed are the functions that torch's
stable headers declare for the oldest torch that the package supports, and the C and C++ runtimes;
one symbol of a torch C++ class or function would tie the library to the torch it was built with.
"""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch

from dimr_fast import _extension
from tests.support.paths import ROOT

INCLUDE = Path(torch.__file__).parent / "include" / "torch" / "csrc"
HEADERS = ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h")
SINCE = r"#if TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)_0\n(.*?)#endif // TORCH_FEATURE"

NM = shutil.which("nm")
GXX = shutil.which("g++")
has_nm = pytest.mark.skipif(NM is None, reason="no nm to read symbol tables with")

RUNTIMES = re.compile(
    # The versions that glibc, libgcc and libstdc++ give to their symbols …
    r".+@@?(GLIBC|GCC|GLIBCXX|CXXABI)_[\d.]+"
    # … what the linker adds …
    r"|_ITM_(de)?registerTMCloneTable|__gmon_start__|__cxa_finalize"
    # … and members of std, new and delete that another library exported first, unversioned.
    r"|_ZT?[ISTV]?N?[KRO]*S[tabdios].*|_Z(nw|na|dl|da).*"
)
TORCH_CLASSES = re.compile(r"(?<!\d)(2at|3c10|5torch|6caffe2)(?=[\dA-Z])")

WRONG = {
    "_ZN2at1fEv": "namespace at { int f(); } int g() { return at::f(); }",
    "_ZN3c101AC1ERKS0_": """
        namespace c10 { struct A { A(const A&); }; }
        void g(c10::A a) { c10::A b(a); }""",
    "_ZN5torch4modeE": "namespace torch { extern int mode; } int g() { return torch::mode; }",
    "_Z1fSt4lessIN2at1TEE": """
        #include <functional>
        namespace at { struct T; }
        void f(std::less<at::T>);
        void g() { f({}); }""",
    "THPVariable_Wrap": """
        extern "C" void* THPVariable_Wrap(void*);
        void* g() { return THPVariable_Wrap(nullptr); }""",
}
"""Libraries that are tied to one torch, by the symbol that shows it."""


def oldest_torch() -> tuple[int, int]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (oldest,) = [d for d in project["dependencies"] if d.startswith("torch>=")]
    major, minor = oldest.removeprefix("torch>=").split(".")
    return int(major), int(minor)


def declared() -> tuple[set[str], set[str]]:
    """Return the C functions of torch's stable headers: of the oldest torch, and newer ones."""
    text = "".join((INCLUDE / header).read_text() for header in HEADERS)
    newer = ""
    for major, minor, block in re.findall(SINCE, text, re.DOTALL):
        if (int(major), int(minor)) > oldest_torch():
            newer += block
            text = text.replace(block, "")
    functions = r"\b((?:aoti_)?torch_\w+)\s*\("
    return set(re.findall(functions, text)), set(re.findall(functions, newer))


def undefined(library: Path) -> list[str]:
    """Return the symbols that the library needs, with their versions."""
    command = [NM, "-D", "--undefined-only", "--with-symbol-versions", library]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in listing.splitlines()]


def unstable(symbols: list[str]) -> list[str]:
    """Return the symbols outside the stable interface and the C and C++ runtimes."""
    stable, _ = declared()
    return [
        symbol
        for symbol in symbols
        if symbol not in stable and (TORCH_CLASSES.search(symbol) or not RUNTIMES.fullmatch(symbol))
    ]


@has_nm
@pytest.mark.parametrize("name", _extension.LIBRARIES)
def test_libraries_use_only_the_stable_interface(name):
    library = Path(_extension.__file__).parent / f"libdimr_fast_{name}.so"
    if not library.is_file():
        pytest.skip(f"{name} library: {_extension.why_not(name)}")
    symbols = undefined(library)
    assert "torch_library_impl" in symbols
    assert unstable(symbols) == []


@has_nm
@pytest.mark.skipif(GXX is None, reason="no g++ to build a wrong library with")
@pytest.mark.parametrize("named", WRONG)
def test_a_library_that_needs_other_symbols_is_detected(tmp_path, named):
    source, library = tmp_path / "wrong.cpp", tmp_path / "wrong.so"
    source.write_text(WRONG[named])
    subprocess.run([GXX, "-shared", "-fPIC", source, "-o", library], check=True)
    assert unstable(undefined(library)) == [named]


def test_functions_of_a_newer_torch_are_detected():
    stable, newer = declared()
    assert {"torch_call_dispatcher", "aoti_torch_get_dtype"} <= stable
    assert not stable & newer
    assert unstable([*stable, *newer]) == list(newer)


def test_the_build_targets_the_oldest_torch():
    (target,) = re.findall(
        r"TORCH_TARGET_VERSION=0x(\w{16})\b", (ROOT / "CMakeLists.txt").read_text()
    )
    assert (int(target[:2], 16), int(target[2:4], 16)) == oldest_torch()
