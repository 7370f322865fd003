"""Builds the compiled libraries with CMake; everything else is in pyproject.toml."""

import json
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))

from build_support import toolchain  # noqa: E402

REASONS = "_not_built.json"
OUTPUTS = ("libdimr_fast_*.so", "_bindings.*.so", REASONS)


class CMakeBuild(build_ext):
    """Runs CMake once for all libraries, and leaves beside them why any is missing."""

    def run(self) -> None:
        output = self._output_folder()
        output.mkdir(parents=True, exist_ok=True)
        for stale in self._built():
            stale.unlink()
        nvcc = toolchain.choose_nvcc()
        definitions = {}
        if isinstance(nvcc, Path):
            architectures = toolchain.choose_architectures(
                os.environ.get("TORCH_CUDA_ARCH_LIST"), toolchain.supported_architectures(nvcc)
            )
            definitions = {
                "CMAKE_CUDA_COMPILER": nvcc,
                "CMAKE_CUDA_ARCHITECTURES": toolchain.cmake_architectures(architectures),
                "DIMR_FAST_CUDA_ARCHITECTURES": " ".join(architectures),
            }
        reasons = {} if isinstance(nvcc, Path) else {"cuda": nvcc}
        no_compiler = toolchain.why_no_compiler()
        if no_compiler:
            reasons["cpu"] = no_compiler
        else:
            self._compile(output, definitions)
        for library, reason in reasons.items():
            self.warn(f"dimr_fast: the {library} library was not built: {reason}")
        (output / REASONS).write_text(json.dumps(reasons) + "\n")

    def _compile(self, output: Path, definitions: dict[str, object]) -> None:
        import pybind11

        torch = toolchain.find_torch()
        if torch is None:
            raise toolchain.BuildError(
                "torch: no torch >= {}.{} to build against; install it first".format(
                    *toolchain.OLDEST_TORCH
                )
            )
        print(f"dimr_fast: building against torch {torch.version}")
        definitions = {
            **definitions,
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "Python_EXECUTABLE": sys.executable,
            "PYBIND11_FINDPYTHON": "ON",
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_ROOT": torch.root,
            "TORCH_VERSION": torch.version,
            "DIMR_FAST_VERSION": self.distribution.get_version(),
        }
        build = str(Path(self.build_temp).resolve())
        arguments = [f"-D{name}={value}" for name, value in definitions.items()]
        jobs = os.environ.get("MAX_JOBS")
        try:
            subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *arguments], check=True)
            subprocess.run(["cmake", "--build", build, *(["-j", jobs] if jobs else [])], check=True)
        except subprocess.CalledProcessError as error:
            advice = " (DIMR_FAST_SKIP_CUDA=1 builds without CUDA)" if "CMAKE_CUDA_COMPILER" in definitions else ""
            raise toolchain.BuildError(f"the build failed, see above{advice}") from error

    def _output_folder(self) -> Path:
        return Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent

    def _built(self) -> list[Path]:
        return [file for pattern in OUTPUTS for file in self._output_folder().glob(pattern)]

    def get_outputs(self) -> list[str]:
        return [str(file) for file in self._built()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("dimr_fast._bindings", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
