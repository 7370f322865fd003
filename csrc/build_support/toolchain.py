"""What the machine offers a build: torch's folders, the compilers, the GPU architectures.

Nothing here imports torch: a build must not depend on whether torch can be imported in pip's
isolated environment, only on where its headers and libraries lie.
"""

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH = (2, 11)
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0")
"""What `TORCH_CUDA_ARCH_LIST=all` compiles for, and the last one also as PTX, for newer GPUs."""
ALL = "all"
NO_GPU = (
    "nvidia-smi is absent, fails or finds no GPU; to compile it for another machine, install from "
    "source with TORCH_CUDA_ARCH_LIST=all or a list of architectures such as '8.0;9.0'"
)


class BuildError(Exception):
    """A build setting that cannot be honoured; its text names the setting and what it was."""


@dataclass(frozen=True)
class Torch:
    """An installed torch: the folder of the package and its version."""

    root: Path
    version: str


def _folders_with_packages() -> list[Path]:
    # Inside pip's isolated build the interpreter is still the target environment's, so sysconfig
    # names the target's folders; the build environment's own come last, through sys.path.
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    in_venv = sys.prefix != sys.base_prefix
    if not in_venv or _sees_system_packages():
        # isolation hides the user's own packages from sys.path; they belong to the target too
        folders += [*site.getsitepackages([sys.base_prefix]), site.getusersitepackages()]
    return [Path(folder) for folder in dict.fromkeys([*folders, *filter(None, sys.path)])]


def _sees_system_packages() -> bool:
    settings = Path(sys.prefix, "pyvenv.cfg")
    return settings.is_file() and bool(
        re.search(r"(?im)^include-system-site-packages\s*=\s*true\s*$", settings.read_text())
    )


def find_torch(folders: list[Path] | None = None) -> Torch | None:
    """The torch to build against, the target environment's before the build environment's.

    A torch older than the stable ABI needs does not count: pip is about to replace it.
    """
    for folder in _folders_with_packages() if folders is None else folders:
        facts = folder / "torch" / "version.py"
        headers = folder / "torch" / "include" / "torch" / "csrc" / "stable"
        if not (facts.is_file() and headers.is_dir()):
            continue
        version = re.search(
            r"^__version__\s*=\s*['\"]((\d+)\.(\d+)[^'\"]*)", facts.read_text(), re.M
        )
        if version and (int(version[2]), int(version[3])) >= OLDEST_TORCH:
            return Torch(folder / "torch", version[1])
    return None


def why_no_compiler(environ: Mapping[str, str] = os.environ) -> str | None:
    """Why C++ cannot be compiled here, or None where it can."""
    named = environ.get("CXX")
    if named:
        if not shutil.which(shlex.split(named)[0], path=environ.get("PATH")):
            return f"no C++ compiler: CXX is {named!r}, which is not there"
    elif not any(shutil.which(c, path=environ.get("PATH")) for c in ("c++", "g++", "clang++")):
        return "no C++ compiler: none of c++, g++, clang++ on PATH and CXX not set"
    return None


def find_nvcc(environ: Mapping[str, str] = os.environ) -> Path | str:
    """The CUDA compiler, or the reason why there is none to use."""
    home = environ.get("CUDA_HOME")
    if home:
        nvcc = Path(home, "bin", "nvcc")
        return nvcc if nvcc.is_file() else f"no nvcc: CUDA_HOME is {home!r}, without bin/nvcc"
    found = shutil.which("nvcc", path=environ.get("PATH"))
    return Path(found) if found else "no nvcc: not on PATH and CUDA_HOME not set"


@dataclass(frozen=True)
class CudaPlan:
    """The CUDA compiler and the architectures to compile for, such as ("8.0", "9.0+PTX")."""

    nvcc: Path
    architectures: tuple[str, ...]


def plan_cuda(environ: Mapping[str, str] = os.environ) -> CudaPlan | str:
    """Return how to build the CUDA library, or the reason why it is not built.

    It is built for the GPUs of this machine, or for those that `TORCH_CUDA_ARCH_LIST` names; for
    `DEFAULT_ARCHITECTURES` if that is "all", or if `DIMR_FAST_FORCE_CUDA=1` and there is no GPU.
    Also heeds `DIMR_FAST_SKIP_CUDA` and `CUDA_HOME`. Raises BuildError if they contradict each
    other, are malformed or cannot be honoured.
    """
    skip, force = (environ.get(f"DIMR_FAST_{word}_CUDA") == "1" for word in ("SKIP", "FORCE"))
    if skip and force:
        raise BuildError("DIMR_FAST_SKIP_CUDA=1 and DIMR_FAST_FORCE_CUDA=1 exclude each other")
    if skip:
        return "skipped: DIMR_FAST_SKIP_CUDA=1"
    requested = environ.get("TORCH_CUDA_ARCH_LIST", "")
    if requested == "native":  # torch's word for the GPUs of this machine
        requested = ""
    if requested not in ("", ALL):
        parse_architectures(requested)
    gpus = () if requested else find_gpus(environ)
    if not (requested or gpus or force):
        return NO_GPU
    plan: CudaPlan | Path | str = why_no_compiler(environ) or find_nvcc(environ)
    if isinstance(plan, Path):
        supported = supported_architectures(plan)
        if gpus:
            plan = _plan_for_gpus(plan, gpus, supported)
        else:
            plan = CudaPlan(plan, choose_architectures(requested or ALL, supported))
    if force and isinstance(plan, str):
        raise BuildError(f"DIMR_FAST_FORCE_CUDA=1 but the CUDA library cannot be built: {plan}")
    return plan


def find_gpus(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the compute capabilities of the NVIDIA GPUs of this machine, such as ("8.0", "9.0").

    Sorted, each once. Empty if nvidia-smi, which comes with the driver, is absent or fails.
    """
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        return ()
    query = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):  # a driver that does not answer
        return ()
    return tuple(sorted(set(re.findall(r"^\s*(\d+\.\d)\s*$", listing, re.M)), key=float))


def _plan_for_gpus(nvcc: Path, gpus: tuple[str, ...], supported: tuple[str, ...]) -> CudaPlan | str:
    architectures = []
    for gpu in gpus:
        older = [a for a in supported if float(a) <= float(gpu)]
        if older:
            # The driver translates PTX for a GPU that is newer than this nvcc.
            architectures.append(gpu if older[-1] == gpu else older[-1] + "+PTX")
    if architectures:
        return CudaPlan(nvcc, tuple(dict.fromkeys(architectures)))
    return f"this nvcc supports {', '.join(supported)}, the GPUs here are {', '.join(gpus)}"


def parse_architectures(text: str) -> tuple[str, ...]:
    """Return a list of architectures as a tuple such as ("8.0", "9.0a", "10.0+PTX")."""
    entries = tuple(text.replace(";", " ").replace(",", " ").split())
    wrong = [e for e in entries if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", e)]
    if wrong or not entries:
        named = ", ".join(map(repr, wrong)) or "nothing"
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST: got {text!r}, with {named} for an architecture; "
            "expected 'all' or a list such as '8.0;9.0;10.0+PTX'"
        )
    return entries


def choose_architectures(text: str, supported: tuple[str, ...]) -> tuple[str, ...]:
    """Return the architectures to compile for: those named in `text`, or for "all" the defaults.

    `supported` are nvcc's, such as ("8.0", "9.0"), oldest first. Of the defaults, those that it
    does not support are left out; it is a BuildError for an architecture named.
    """
    if text == ALL:
        known = [a for a in DEFAULT_ARCHITECTURES if a in supported] or [supported[-1]]
        return (*known[:-1], known[-1] + "+PTX")
    entries = parse_architectures(text)
    unknown = [e for e in entries if re.sub(r"[af]?(\+PTX)?$", "", e) not in supported]
    if unknown:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST: got {text!r}, but this nvcc does not support "
            f"{', '.join(unknown)}; it supports {', '.join(supported)}"
        )
    return entries


def supported_architectures(nvcc: Path) -> tuple[str, ...]:
    """What this nvcc can compile for, such as ("8.0", "9.0"), oldest first."""
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    numbers = sorted({int(n) for n in re.findall(r"compute_(\d+)\b", listing.stdout)})
    if not numbers:
        raise BuildError(f"{nvcc} --list-gpu-arch gave no architecture: {listing.stderr.strip()}")
    return tuple(f"{n // 10}.{n % 10}" for n in numbers)


def cmake_architectures(architectures: tuple[str, ...]) -> str:
    """The architectures as CMake writes them: "8.0" is "80-real", "10.0+PTX" is "100"."""
    short = [a.replace(".", "") for a in architectures]
    return ";".join(a.removesuffix("+PTX") if a.endswith("+PTX") else f"{a}-real" for a in short)
