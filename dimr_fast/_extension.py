"""Finds and loads the compiled libraries, or keeps the reason why not.

One library a device, "cpu" and "cuda". Each is loaded when first asked for; loading it registers
its kernels for the schemas that `dimr_fast.ops` defines.
"""

import ctypes
import functools
import importlib
import json
import re
from pathlib import Path

import torch

LIBRARIES = ("cpu", "cuda")
_FOLDER = Path(__file__).parent


@torch.compiler.assume_constant_result
def why_not(library: str) -> str | None:
    """The reason why `library` ("cpu" or "cuda") is not loaded, or None once it is.

    The first call tries to load it; its answer holds for the life of the process.
    """
    return _load(library)


@functools.cache
def _load(library: str) -> str | None:
    if library not in LIBRARIES:
        raise ValueError(f"library: got {library!r}, expected one of {LIBRARIES}")
    path = _FOLDER / f"libdimr_fast_{library}.so"
    if not path.is_file():
        return _why_not_built(library)
    if library == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


INSTRUCTION_SETS = ("portable", "AVX2", "AVX-512", "AVX-512 with BF16")
"""What the CPU library is compiled for, from the least to the most that it asks for."""


def instruction_set() -> str:
    """The instructions that the CPU library, once loaded, uses: the best of this processor's."""
    name = _cpu_library().dimr_fast_instruction_set
    name.restype = ctypes.c_char_p
    return name().decode()


def use_instruction_set(name: str) -> bool:
    """Use these instructions from now on; False where this processor lacks them. For tests."""
    return _cpu_library().dimr_fast_use_instruction_set(name.encode()) == 0


def _cpu_library() -> ctypes.CDLL:
    return ctypes.CDLL(str(_FOLDER / "libdimr_fast_cpu.so"))


def _why_not_built(library: str) -> str:
    reasons = _FOLDER / "_not_built.json"
    if not reasons.is_file():
        return "not built: the package runs from a source folder that was never installed"
    return f"not built: {json.loads(reasons.read_text()).get(library, 'unknown reason')}"


@torch.compiler.assume_constant_result
def why_not_gpu(index: int | None) -> str | None:
    """The reason why the CUDA library has no code for GPU `index` (None: the current one)."""
    return _check_gpu(torch.cuda.current_device() if index is None else index)


@functools.cache
def _check_gpu(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    compiled = str(build_facts().get("cuda_architectures", ""))
    return why_not_architecture((major, minor), compiled)


def why_not_architecture(capability: tuple[int, int], compiled: str) -> str | None:
    """Why a GPU of `capability` cannot run code compiled for, say, "8.0 9.0a 10.0+PTX"."""
    for number, minor_number, suffix, ptx in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", compiled):
        built_for = (int(number), int(minor_number))
        if suffix == "a":
            fits = built_for == capability
        elif ptx and not suffix:
            fits = built_for <= capability
        else:
            fits = built_for[0] == capability[0] and built_for[1] <= capability[1]
        if fits:
            return None
    return f"compiled for {compiled or 'no GPU'}, this GPU is {capability[0]}.{capability[1]}"


def build_facts() -> dict[str, str]:
    """What the libraries were built from; empty where nothing was compiled.

    Keys: version, torch, compiler, cuda (empty without nvcc), cuda_architectures.
    """
    try:
        bindings = importlib.import_module("dimr_fast._bindings")
    except ImportError:
        return {}
    return {
        key: getattr(bindings, key)
        for key in ("version", "torch", "compiler", "cuda", "cuda_architectures")
    }
