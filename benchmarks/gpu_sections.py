"""The sections of the GPU report: `python benchmarks/gpu_sections.py NAME --out DIR --seconds S`.

`gpu_report.py` starts each in a process of its own and says how long it may take. A section writes
`DIR/NAME.json` anew after each thing that it found, so that nothing of it is lost.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_benchmarks import run_benchmarks
from gpu_part import PYTEST, Part, nvidia_smi
from gpu_render import plot

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
TESTS = ROOT / "tests"


def machine(part: Part) -> None:
    """What this is: hardware, versions, tools, the commit."""
    part.fact("commit", _commit() or "unknown: no git here")
    part.fact("Python", platform.python_version())
    part.fact("CPU", _processor())
    part.fact("cores", os.cpu_count())
    for tool in ("nvcc", "compute-sanitizer", "nvidia-smi"):
        part.fact(tool, shutil.which(tool) or "none")
    for module in ("matplotlib", "xdist"):
        part.fact(module, "there" if importlib.util.find_spec(module) else "none")
    fields = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,temperature.gpu"
    for name, value in nvidia_smi(fields).items():
        part.fact(name, value)
    import torch

    part.fact("torch", torch.__version__)
    part.fact("CUDA of torch", torch.version.cuda or "none")
    part.fact("cuDNN", torch.backends.cudnn.version() or "none")
    with suppress(ImportError):
        import triton

        part.fact("triton", triton.__version__)
    if not torch.cuda.is_available():
        part.fact("GPU", "none")
        return
    facts = torch.cuda.get_device_properties(0)
    part.fact("GPU", facts.name)
    part.fact("compute capability", f"{facts.major}.{facts.minor}")
    part.fact("multiprocessors", facts.multi_processor_count)
    part.fact("memory, GiB", round(facts.total_memory / 2**30, 1))
    part.fact("L2, MiB", round(facts.L2_cache_size / 2**20, 1))


def _commit() -> str:
    found = []
    for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"]):
        with suppress(OSError):
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
            found.append(done.stdout.strip())
    commit, changed = found or ("", "")
    return commit + ("+" if commit and changed else "")


def _processor() -> str:
    with suppress(OSError):
        names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
        if names:
            return str(names[0])
    return platform.processor() or "unknown"


def build(part: Part) -> None:
    """The compiled libraries in place, for this GPU alone; in a dry run what is there already."""
    if part.dry_run:
        part.note("Would build the compiled libraries in place.")
    else:
        build_in_place(part, ROOT)
    if part.step("info", [sys.executable, "-m", "dimr_fast.info"]):
        facts = [sys.executable, "-c", BUILT]
        done = subprocess.run(facts, cwd=ROOT, capture_output=True, text=True, check=True)
        for name, value in json.loads(done.stdout).items():
            part.fact(name, value)
            if name.endswith(" library") and value != "loaded" and not part.dry_run:
                part.warn(f"The {name} is not loaded: {value}")
                # A library that is there has to load.
                part.failed |= not value.startswith("not built")


def build_in_place(part: Part, root: Path) -> None:
    """Compile into the checkout `root`; without CUDA where the CUDA library does not compile.

    Without pip, which an isolated machine may not have set up: `gpu_report.py` puts `root` on the
    path of the sections that follow.
    """
    # Kernels in Triton need no compiled library, but are found only through this.
    link = root / "dimr_fast" / "kernels"
    if not link.exists():
        link.symlink_to(root / "kernels")
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, others)])
    architecture = _architecture()
    for_cuda = {"DIMR_FAST_FORCE_CUDA": "1", "DIMR_FAST_SKIP_CUDA": "0"}
    if architecture and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        for_cuda["TORCH_CUDA_ARCH_LIST"] = architecture

    def compile_for(device: str, environment: Mapping[str, str], seconds: float) -> bool:
        command = [sys.executable, root / "setup.py", "build_ext", "--build-lib", root]
        command += ["--build-temp", root / "build" / "gpu_report" / device]
        return part.step(
            f"build for {device}",
            command,
            seconds=seconds,
            environment=environment,
            # Without a pyproject.toml, which an old setuptools may not understand.
            folder=part.out,
            optional=device == "cuda",
        )

    if not compile_for("cuda", for_cuda, 0.6 * part.left()):
        part.warn(
            "The CUDA library did not build (build.log says why): its implementations are missing "
            "here, and whatever could use them runs by others."
        )
        without = {"DIMR_FAST_FORCE_CUDA": "0", "DIMR_FAST_SKIP_CUDA": "1"}
        compile_for("cpu", without, part.left())


BUILT = """
import json
from dimr_fast import _extension
libraries = {f"{name} library": _extension.why_not(name) or "loaded" for name in ("cpu", "cuda")}
print(json.dumps(_extension.build_facts() | libraries))
"""


def _architecture() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def tests(part: Part) -> None:
    """The tests that need a GPU."""
    if part.dry_run:
        part.pytest(
            "one test, on the CPU", ["tests/test_rms_norm.py", "-k", "residual and not triton"]
        )
        return
    # By file: others may import what a bare machine lacks.
    files = [f for f in sorted(TESTS.glob("test_*.py")) if "pytest.mark.gpu" in f.read_text()]
    part.pytest("marked gpu", [*files, "-m", "gpu"])


def kernels(part: Part) -> None:
    """The operators' and the model's tests, Triton's kernels on the GPU itself.

    Not those of random shapes, each of which is compiled: `pytest tests -m hypothesis` runs them.
    """
    if part.dry_run:
        part.pytest("one test, interpreted", ["tests/test_gated_gelu.py", "-k", "deterministic"])
        return
    names = ("attention", "gated_gelu", "rms_norm", "td_layer_norm", "td_parameters")
    names = ("model_kernels", *names, "td_rms_norm", "td_rms_norm_into", "upsample_add")
    files: list[str | Path] = [TESTS / f"test_{name}.py" for name in names]
    files.append("tests/test_inference.py::test_triton_adds_the_mlp_in_place")
    chosen = ["-m", "not hypothesis", "-k", f"not ({NO_GPU_NEEDED})"]
    part.pytest("operators and model", [*files, *chosen, *in_parallel(14)])


def in_parallel(workers: int) -> list[str]:
    """Arguments of pytest for so many processes, none where pytest-xdist is not installed.

    A process that has run out of tests takes over another's: each compiles for itself.
    """
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(workers), "--dist", "worksteal"]


NO_GPU_NEEDED = (
    "cpu or bare_operator or instruction_set or threads or "
    "compiled or spill or 16_byte or widest or tensor_cores or multiplied_as"
)
"""Tests of the CPU library, and of what kernels compile to ahead of time: known without a GPU."""


def measure(part: Part) -> None:
    """Ceilings, and what libraries do at the model's shapes."""
    from measure_first import measure_all

    measure_all(part)


def memory(part: Part) -> None:
    """Memory checkers over our kernels, at small shapes."""
    scratch = part.out / ".tuned.json"
    every_triton = [sys.executable, "benchmarks/tune.py", "--dry-run", "--out", str(scratch)]
    commands = {"CUDA": [*PYTEST, *SMALL_CUDA], "Triton": every_triton}
    tool = shutil.which("compute-sanitizer")
    why_not = "compute-sanitizer is not on PATH" if tool is None else None
    if part.dry_run:
        why_not = "a dry run has no GPU"
    for checker, what in CHECKS:
        title = f"{checker}, {what}"
        log = part.out / f"memory_{checker}_{what}.txt"
        under = [tool or "compute-sanitizer", "--tool", checker, "--error-exitcode", "66"]
        under += ["--print-limit", "50", "--log-file", str(log)]
        if why_not:
            part.note(f"Not run: {why_not}: {shlex.join([*under, *commands[what]])}")
            continue
        log.unlink(missing_ok=True)
        # Cached memory hides what lies beyond a tensor: each is to be an allocation of its own.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        if what == "CUDA":
            well = part.pytest(title, SMALL_CUDA, under=under, environment=environment).well
        else:
            well = part.step(title, [*under, *every_triton], environment=environment)
        found = sanitized(log.read_text(errors="replace") if log.is_file() else "")
        part.rows("memory checks", [{"check": title, "ended well": well} | found])
    scratch.unlink(missing_ok=True)


CHECKS = (
    ("memcheck", "CUDA"),
    ("memcheck", "Triton"),
    ("racecheck", "CUDA"),
    ("initcheck", "CUDA"),
    ("racecheck", "Triton"),
)
SMALL_CUDA = (
    "tests/test_depthwise_conv2d_gpu.py",
    "-k",
    "2-17-19 or 1-1-1-17 or 1-32-32-576 or slice",
)


def sanitized(log: str) -> dict[str, Any]:
    """What a log of compute-sanitizer says: its summary, and reports that name kernels of ours."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", log)
    ours = re.findall(r"^=+\s+at .*(?:dimr_fast::|_kernel\b).*$", log, re.M)
    return {"summary": summary[-1] if summary else "none", "in our kernels": len(ours)}


def tune(part: Part) -> None:
    """The fastest launch configurations, for the sections that follow too."""
    folder = part.out / "configurations"
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "benchmarks/tune.py"]
    if part.dry_run:
        file = folder / "dry_run.json"
        dry = ["--dry-run", "--only", "gated_gelu_fwd", "gated_gelu_bwd"]
        part.step("tune", [*command, "--out", file, *dry])
    else:
        import torch

        from dimr_fast.kernels import configuration

        installed = configuration.path(torch.cuda.get_device_name())
        file = folder / installed.name
        if installed.is_file():
            shutil.copy(installed, file)
        minutes = part.left() / 60
        only = ["--only", *part.chosen.split()] if part.chosen else []
        part.step("tune", [*command, "--out", file, "--minutes", str(minutes), *only])
        if file.is_file():
            shutil.copy(file, installed)
    with suppress(OSError):
        table = json.loads(file.read_text())
        part.rows(
            "tuned",
            [
                {"kernel": kernel, "up to": size, "configuration": json.dumps(constants)}
                for kernel, by_size in table.items()
                for size, constants in by_size.items()
            ],
        )


def model(part: Part) -> None:
    """The whole model, sampling and training, against the published execution."""
    rows = DRY_MODEL if part.dry_run else ON_GPU
    run_benchmarks(part, [MODEL], f"{rows} and not compile")


def operators(part: Part) -> None:
    """Each operator's implementations, except what torch.compile makes of the reference."""
    rows = DRY_OPERATORS if part.dry_run else ON_GPU
    run_benchmarks(part, _operators(part), f"{rows} and not compile")


def compiled(part: Part) -> None:
    """The model and the operators by torch.compile: much compiling for a few figures."""
    if part.dry_run:
        run_benchmarks(part, _operators(part), f"{DRY_OPERATORS} and compile", compiled=True)
    else:
        run_benchmarks(part, [MODEL, *_operators(part)], f"{ON_GPU} and compile", compiled=True)


def plots(part: Part) -> None:
    """Pictures of what the other sections have left."""
    if importlib.util.find_spec("matplotlib") is None:
        part.note("No plots: matplotlib is not installed.")
        return
    results = json.loads((part.out / "results.json").read_text())
    for file in plot(results, part.out):
        part.rows("plots", [{"file": file.name}])


MODEL = BENCHMARKS / "bench_model.py"
ON_GPU, DRY_MODEL, DRY_OPERATORS = (
    "cuda-",
    "cpu-demo-1-bfloat16-forward",
    "cpu- and -forward- and not triton",
)
"""Rows by their names."""
IN_ORDER = ("td_rms_norm", "depthwise_conv2d", "attention", "upsample_add", "gated_gelu")
"""The operators whose figures matter most; the others follow."""


def _operators(part: Part) -> list[Path]:
    files = [f for f in BENCHMARKS.glob("bench_*.py") if f != MODEL]
    if part.dry_run:
        files = [f for f in files if f.stem == "bench_rms_norm"]
    weight = {f"bench_{name}": -i for i, name in enumerate(reversed(IN_ORDER), 1)}
    return sorted(files, key=lambda f: (weight.get(f.stem, 0), f.stem))


SECTIONS = {
    f.__name__: f
    for f in (
        machine,
        build,
        tests,
        measure,
        kernels,
        tune,
        model,
        operators,
        compiled,
        plots,
        memory,
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SECTIONS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rows", help="only some of the section's")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    part = Part(options.name, options.out, options.seconds, options.dry_run, options.rows)
    SECTIONS[options.name](part)
    return int(part.failed)


if __name__ == "__main__":
    sys.exit(main())
