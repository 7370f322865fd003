"""Load the compiled libraries, or record why they cannot be loaded.

There is one library per device, "cpu" and "cuda". Each is loaded at its first use; loading it
registers its kernels for the schemas that `dimr_fast.ops` defines.
"""

import ctypes
import functools
import json
import re
from pathlib import Path

import torch

from dimr_fast.utils.compilation import constant_result

LIBRARIES = ("cpu", "cuda")
_FOLDER = Path(__file__).parent


@constant_result
def why_not(library: str) -> str | None:
    """Return why `library` ("cpu" or "cuda") is not loaded, or None if it is.

    The first call loads the library; later calls in the same process return the same answer.
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


INSTRUCTION_SETS = ("portable", "AVX2", "AVX-512", "AVX-512 with BF16", "AMX")
"""The instruction sets that the CPU library is compiled for, each including those before it."""


def instruction_set() -> str:
    """Return the instruction set that the CPU library uses: the best that this processor has.

    The library must be loaded.
    """
    name = _cpu_library().dimr_fast_instruction_set
    name.restype = ctypes.c_char_p
    return name().decode()


def use_instruction_set(name: str) -> bool:
    """Switch to an instruction set; return False if this processor lacks it. For tests only."""
    return _cpu_library().dimr_fast_use_instruction_set(name.encode()) == 0


@functools.cache
def _cpu_library() -> ctypes.CDLL:
    return ctypes.CDLL(str(_FOLDER / "libdimr_fast_cpu.so"))


def _why_not_built(library: str) -> str:
    reasons = _FOLDER / "_not_built.json"
    if not reasons.is_file():
        return "not built: the package runs from a source folder that was never installed"
    return f"not built: {json.loads(reasons.read_text()).get(library, 'unknown reason')}"


@constant_result
def why_not_gpu(index: int | None) -> str | None:
    """Return why the CUDA library cannot run on GPU `index`, or None if it can.

    `index` None means the current GPU.
    """
    return _check_gpu(torch.cuda.current_device() if index is None else index)


@functools.cache
def _check_gpu(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    compiled = str(build_facts().get("cuda_architectures", ""))
    return why_not_architecture((major, minor), compiled)


def why_not_architecture(capability: tuple[int, int], compiled: str) -> str | None:
    """Return why a GPU cannot run code compiled for `compiled` architectures, or None if it can.

    `capability` is the GPU's compute capability; `compiled` is a list such as "8.0 9.0a 10.0+PTX".
    """
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
    """Return the versions that the libraries were built with, empty if nothing was compiled.

    Keys: version, torch, compiler, cuda (nvcc's version, empty without the CUDA library) and
    cuda_architectures.
    """
    file = _FOLDER / "_built.json"
    return json.loads(file.read_text()) if file.is_file() else {}
