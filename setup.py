"""Builds the compiled libraries with CMake; everything else is in pyproject.toml.

They are no Python modules: one build serves every version of Python and, on the stable ABI, of
torch.
"""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc"))

from build_support import toolchain  # noqa: E402

FACTS, REASONS = "_built.json", "_not_built.json"
OUTPUTS = ("libdimr_fast_*.so", FACTS, REASONS)


class CMakeBuild(build_ext):
    """Runs CMake once for all libraries; writes beside them what built them and which are missing.

    `dimr_fast._extension` reads both files.
    """

    def run(self) -> None:
        try:
            self._build()
        except toolchain.BuildError as error:
            raise SystemExit(f"error: {error}") from None

    def _build(self) -> None:
        cuda, no_compiler = toolchain.plan_cuda(), toolchain.why_no_compiler()
        output = self._output_folder()
        output.mkdir(parents=True, exist_ok=True)
        for stale in self._built():
            stale.unlink()
        if no_compiler is None:
            self._compile(output, cuda)
        reasons = {"cpu": no_compiler, "cuda": cuda if isinstance(cuda, str) else None}
        missing = {library: reason for library, reason in reasons.items() if reason}
        for library, reason in missing.items():
            self.warn(f"dimr_fast: the {library} library is not built: {reason}")
        (output / REASONS).write_text(json.dumps(missing) + "\n")

    def _compile(self, output: Path, cuda: toolchain.CudaPlan | str) -> None:
        torch = toolchain.find_torch()
        if torch is None:
            oldest = ".".join(map(str, toolchain.OLDEST_TORCH))
            raise toolchain.BuildError(
                f"torch: none >= {oldest} to build against; install it first"
            )
        definitions = {
            "CMAKE_BUILD_TYPE": "Release",
            # That of an earlier installation may have been in an environment that is gone.
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "TORCH_ROOT": torch.root,
        }
        facts = {"version": self.distribution.get_version(), "torch": torch.version}
        advice, architectures = "", ""
        if isinstance(cuda, toolchain.CudaPlan):
            advice = "; DIMR_FAST_SKIP_CUDA=1 builds without CUDA"
            architectures = " ".join(cuda.architectures)
            definitions |= {
                "CMAKE_CUDA_COMPILER": cuda.nvcc,
                "CMAKE_CUDA_ARCHITECTURES": toolchain.cmake_architectures(cuda.architectures),
            }
        # Kept, so that another installation compiles only what has changed. A build without CUDA
        # has a folder of its own: CMake would keep the CUDA compiler of an earlier one.
        kind = "cuda" if isinstance(cuda, toolchain.CudaPlan) else "cpu"
        build = ROOT / "build" / f"torch-{torch.version}-{kind}"
        arguments = [f"-D{name}={value}" for name, value in definitions.items()]
        jobs = os.environ.get("MAX_JOBS")
        print(f"dimr_fast: building against torch {torch.version}", flush=True)
        try:
            subprocess.run(
                ["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *arguments], check=True
            )
            subprocess.run(["cmake", "--build", build, *(["-j", jobs] if jobs else [])], check=True)
        except subprocess.CalledProcessError:
            raise toolchain.BuildError(f"the compilers failed, see above{advice}") from None
        facts |= json.loads((build / "compilers.json").read_text())
        facts["cuda_architectures"] = architectures
        (output / FACTS).write_text(json.dumps(facts) + "\n")

    def _output_folder(self) -> Path:
        return Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent

    def _built(self) -> list[Path]:
        return [file for pattern in OUTPUTS for file in self._output_folder().glob(pattern)]

    def get_outputs(self) -> list[str]:
        return [str(file) for file in self._built()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


# Listed for the source distribution; what is compiled, CMake decides.
SUFFIXES = {".c", ".cpp", ".h", ".cu", ".cuh", ".py"}
FOUND = (f for f in (ROOT / "csrc").rglob("*") if f.suffix in SUFFIXES)
SOURCES = ["CMakeLists.txt", *(str(f.relative_to(ROOT)) for f in FOUND)]

commands: dict[str, type] = {"build_ext": CMakeBuild}
# benchmarks/gpu builds in place, perhaps with a setuptools that has no such command.
with suppress(ImportError):
    from setuptools.command.bdist_wheel import bdist_wheel

    class Wheel(bdist_wheel):
        """Tags a wheel for its platform only, because nothing compiled depends on Python."""

        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    commands["bdist_wheel"] = Wheel

setup(
    ext_modules=[Extension("dimr_fast.libraries", sources=sorted(SOURCES))],
    cmdclass=commands,
)
