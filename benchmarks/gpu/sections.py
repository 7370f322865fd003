"""Implement the sections of the GPU report.

    python -m benchmarks.gpu.sections NAME --out DIR --seconds S

`run.py` starts each section as such a process and limits its time. A section writes `DIR/NAME.json`
after each finding, so an interrupted section keeps its findings.
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

from benchmarks.gpu import nvidia_smi
from benchmarks.gpu.benchmark_session import is_compiled, run_benchmarks
from benchmarks.gpu.render import plot
from benchmarks.gpu.section_run import PYTEST, SectionRun
from benchmarks.utils.files import BENCHMARKS, ROOT
from benchmarks.utils.machine import commit, processor
from benchmarks.utils.names import FP8_PROVIDERS, OURS

TESTS = ROOT / "tests"


def machine(section: SectionRun) -> None:
    """State hardware, versions, tools and the commit."""
    section.add_fact("commit", commit())
    section.add_fact("Python", platform.python_version())
    section.add_fact("CPU", processor())
    section.add_fact("cores", os.cpu_count())
    for tool in ("nvcc", "compute-sanitizer", "nvidia-smi"):
        section.add_fact(tool, shutil.which(tool) or "none")
    for module in ("matplotlib", "xdist"):
        section.add_fact(module, "installed" if importlib.util.find_spec(module) else "none")
    fields = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,temperature.gpu"
    for name, value in nvidia_smi.query(fields).items():
        section.add_fact(name, value)
    import torch

    section.add_fact("torch", torch.__version__)
    section.add_fact("CUDA of torch", torch.version.cuda or "none")
    section.add_fact("cuDNN", torch.backends.cudnn.version() or "none")
    with suppress(ImportError):
        import triton

        section.add_fact("triton", triton.__version__)
    if not torch.cuda.is_available():
        section.add_fact("GPU", "none")
        return
    facts = torch.cuda.get_device_properties(0)
    section.add_fact("GPU", facts.name)
    section.add_fact("compute capability", f"{facts.major}.{facts.minor}")
    section.add_fact("multiprocessors", facts.multi_processor_count)
    section.add_fact("memory, GiB", round(facts.total_memory / 2**30, 1))
    section.add_fact("L2, MiB", round(facts.L2_cache_size / 2**20, 1))


def build(section: SectionRun) -> None:
    """Build the compiled libraries in place for this GPU; in a dry run only describe them."""
    if section.dry_run:
        section.note("Would build the compiled libraries in place.")
    else:
        build_in_place(section, ROOT)
    if section.run_command("info", [sys.executable, "-m", "dimr_fast.info"]):
        facts = [sys.executable, "-c", BUILD_FACTS]
        done = subprocess.run(facts, cwd=ROOT, capture_output=True, text=True, check=True)
        for name, value in json.loads(done.stdout).items():
            section.add_fact(name, value)
            if name.endswith(" library") and value != "loaded" and not section.dry_run:
                section.warn(f"The {name} is not loaded: {value}")
                # A library that was not built is only a warning; one that does not load fails.
                section.failed |= not value.startswith("not built")


def build_in_place(section: SectionRun, root: Path) -> None:
    """Compile the libraries into the checkout `root`, without CUDA if that does not compile.

    setup.py is called directly, since an isolated machine may lack pip. `run.py` puts `root` on the
    path of later sections.
    """
    # Triton's kernels need no compilation, but are imported through this link.
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
        return section.run_command(
            f"build for {device}",
            command,
            seconds=seconds,
            environment=environment,
            # A folder without pyproject.toml, which an old setuptools cannot read.
            folder=section.out,
            optional=device == "cuda",
        )

    if not compile_for("cuda", for_cuda, 0.6 * section.seconds_left()):
        section.warn(
            "The CUDA library did not build (see build.log): operators use other implementations."
        )
        without = {"DIMR_FAST_FORCE_CUDA": "0", "DIMR_FAST_SKIP_CUDA": "1"}
        compile_for("cpu", without, section.seconds_left())


BUILD_FACTS = """
import json
from dimr_fast import _extension
libraries = {f"{name} library": _extension.why_not(name) or "loaded" for name in ("cpu", "cuda")}
print(json.dumps(_extension.build_facts() | libraries))
"""


def _architecture() -> str | None:
    """Return the GPU's compute capability as TORCH_CUDA_ARCH_LIST expects it."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def find_test(name: str) -> Path:
    """Return the path of a test file, in whichever folder of tests/ it is."""
    (path,) = TESTS.rglob(f"{name}.py")
    return path


def tests(section: SectionRun) -> None:
    """Run the tests that need a GPU."""
    if section.dry_run:
        file = find_test("test_rms_norm")
        section.run_pytest("one test, on the CPU", [file, "-k", "residual and not triton"])
        return
    # Named files only: other test files may import packages that a bare machine lacks.
    files = sorted(TESTS.rglob("test_*.py"))
    files = [file for file in files if "pytest.mark.gpu" in file.read_text()]
    section.run_pytest("marked gpu", [*files, "-m", "gpu"])


def kernels(section: SectionRun) -> None:
    """Run the tests of operators and model, with Triton's kernels on the GPU.

    Tests of random shapes compile each shape and are left out; run them by `pytest tests -m
    hypothesis`.
    """
    if section.dry_run:
        file = find_test("test_gated_gelu")
        section.run_pytest("one test, interpreted", [file, "-k", "deterministic"])
        return
    chosen = ["-m", "not hypothesis", "-k", f"not ({NO_GPU_NEEDED})"]
    section.run_pytest("operators and model", [*kernel_tests(), *chosen, *in_parallel(14)])


def kernel_tests() -> list[str | Path]:
    """Return the tests of the section `kernels`."""
    names = ("attention", "gated_gelu", "rms_norm", "td_layer_norm", "td_parameters")
    names = ("model_kernels", *names, "td_rms_norm", "td_rms_norm_into", "upsample_add")
    names = (*names, "fp8", "gated_gelu_fp8", "td_layer_norm_fp8", "td_rms_norm_fp8")
    files: list[str | Path] = [find_test(f"test_{name}") for name in names]
    return [*files, f"{find_test('test_inference')}::test_triton_adds_the_mlp_in_place"]


def in_parallel(workers: int) -> list[str]:
    """Return pytest arguments for so many processes, or none without pytest-xdist.

    "worksteal" balances the processes, each of which compiles its own kernels.
    """
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(workers), "--dist", "worksteal"]


NO_GPU_NEEDED = (
    "cpu or bare_operator or instruction_set or threads or "
    "compiled or spill or 16_byte or widest or tensor_cores or multiplied_as"
)
"""Tests of the CPU library and of ahead-of-time compilation, which need no GPU."""


def measure(section: SectionRun) -> None:
    """Measure the GPU's ceilings, and libraries at the model's shapes."""
    from benchmarks.gpu.ceilings import measure_all

    measure_all(section)


def memory(section: SectionRun) -> None:
    """Run memory checkers over our kernels at small shapes."""
    scratch = section.out / ".tuned.json"
    every_triton = [sys.executable, "-m", "benchmarks.gpu.tune", "--dry-run", "--out", str(scratch)]
    small_cuda = [find_test("test_depthwise_conv2d_gpu"), "-k", SMALL_CUDA]
    commands = {"CUDA": [*PYTEST, *map(str, small_cuda)], "Triton": every_triton}
    tool = shutil.which("compute-sanitizer")
    why_not = "compute-sanitizer is not on PATH" if tool is None else None
    if section.dry_run:
        why_not = "a dry run has no GPU"
    for checker, language in CHECKS:
        title = f"{checker}, {language}"
        log = section.out / f"memory_{checker}_{language}.txt"
        under = [tool or "compute-sanitizer", "--tool", checker, "--error-exitcode", "66"]
        under += ["--print-limit", "50", "--log-file", str(log)]
        if why_not:
            section.note(f"Not run: {why_not}: {shlex.join([*under, *commands[language]])}")
            continue
        log.unlink(missing_ok=True)
        # Without torch's cache each tensor is an allocation, whose end the checker knows.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        if language == "CUDA":
            passed = section.run_pytest(
                title, small_cuda, under=under, environment=environment
            ).passed
        else:
            passed = section.run_command(title, [*under, *every_triton], environment=environment)
        found = parse_sanitizer_log(log.read_text(errors="replace") if log.is_file() else "")
        section.add_rows("memory checks", [{"check": title, "passed": passed} | found])
    scratch.unlink(missing_ok=True)


CHECKS = (
    ("memcheck", "CUDA"),
    ("memcheck", "Triton"),
    ("racecheck", "CUDA"),
    ("initcheck", "CUDA"),
    ("racecheck", "Triton"),
)
SMALL_CUDA = "2-17-19 or 1-1-1-17 or 1-32-32-576 or slice"
"""Shapes of the CUDA kernels' tests that are small enough for a checker."""


def parse_sanitizer_log(log: str) -> dict[str, Any]:
    """Return the summary of a compute-sanitizer log, and its number of reports on our kernels."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", log)
    ours = re.findall(r"^=+\s+at .*(?:dimr_fast::|_kernel\b).*$", log, re.M)
    return {"summary": summary[-1] if summary else "none", "in our kernels": len(ours)}


def tune(section: SectionRun) -> None:
    """Find the fastest launch configurations; later sections use them too."""
    folder = section.out / "configurations"
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.tune"]
    if section.dry_run:
        file = folder / "dry_run.json"
        dry = ["--dry-run", "--only", "gated_gelu_fwd", "gated_gelu_bwd"]
        section.run_command("tune", [*command, "--out", file, *dry])
    else:
        import torch

        from dimr_fast.kernels import configuration

        installed = configuration.path(torch.cuda.get_device_name())
        file = folder / installed.name
        if installed.is_file():
            shutil.copy(installed, file)
        minutes = section.seconds_left() / 60
        only = ["--only", *section.chosen.split()] if section.chosen else []
        section.run_command("tune", [*command, "--out", file, "--minutes", str(minutes), *only])
        if file.is_file():
            shutil.copy(file, installed)
    with suppress(OSError):
        table = json.loads(file.read_text())
        section.add_rows(
            "tuned",
            [
                {"kernel": kernel, "up to": size, "configuration": json.dumps(constants)}
                for kernel, by_size in table.items()
                for size, constants in by_size.items()
            ],
        )


def model(section: SectionRun) -> None:
    """Time the whole model, in sampling and training, without torch.compile."""
    rows = DRY_MODEL if section.dry_run else ON_GPU
    run_benchmarks(section, [MODEL], f"{rows} and not compile and not fp8")


def operators(section: SectionRun) -> None:
    """Time each operator's implementations, without torch.compile."""
    rows = DRY_OPERATORS if section.dry_run else ON_GPU
    run_benchmarks(section, _operators(section), f"{rows} and not compile")


def compiled(section: SectionRun) -> None:
    """Time the model and the operators under torch.compile, which compiles for long."""
    if section.dry_run:
        run_benchmarks(
            section, _operators(section), f"{DRY_OPERATORS} and compile", shown=is_compiled
        )
    else:
        run_benchmarks(
            section,
            [MODEL, *_operators(section)],
            f"{ON_GPU} and compile and not torchao",
            shown=is_compiled,
        )


def fp8(section: SectionRun) -> None:
    """Time sampling in FP8: ours against ours in bf16, and torchao's quantisation, which compiles.

    The rows of bf16 are timed again, so that all are of one run. A dry run checks them and times
    none, since FP8 is slow on a CPU.
    """
    if section.dry_run:
        arguments = [MODEL, "--benchmark-disable", "-k", f"{DRY_MODEL} and fp8"]
        section.run_pytest("fp8: checked, not timed", arguments)
        return
    providers = (OURS, *FP8_PROVIDERS)
    run_benchmarks(section, [MODEL], f"{ON_GPU} and ({FP8_ROWS})", shown=lambda p: p in providers)


def plots(section: SectionRun) -> None:
    """Plot the results of the other sections."""
    if importlib.util.find_spec("matplotlib") is None:
        section.note("No plots: matplotlib is not installed.")
        return
    results = json.loads((section.out / "results.json").read_text())
    for file in plot(results, section.out):
        section.add_rows("plots", [{"file": file.name}])


MODEL = BENCHMARKS / "model" / "bench_model.py"
ON_GPU, DRY_MODEL, DRY_OPERATORS = (
    "cuda-",
    "cpu-demo-1-bfloat16-forward",
    "cpu- and -forward- and not triton",
)
"""Pytest -k expressions that select rows by their names."""
MOST_IMPORTANT = ("td_rms_norm", "depthwise_conv2d", "attention", "upsample_add", "gated_gelu")
"""Operators that run first, in this order."""


FP8_ROWS = "XL/2R and forward and ours or fp8"
"""Pytest -k expression of the rows of section `fp8`: the model that FP8 is measured on."""


def _operators(section: SectionRun) -> list[Path]:
    """Return the operators' benchmark files, the most important first."""
    files = list((BENCHMARKS / "ops").glob("bench_*.py"))
    if section.dry_run:
        files = [f for f in files if f.stem == "bench_rms_norm"]
    weight = {f"bench_{name}": -i for i, name in enumerate(reversed(MOST_IMPORTANT), 1)}
    return sorted(files, key=lambda f: (weight.get(f.stem, 0), f.stem))


SECTIONS = {
    section.__name__: section
    for section in (
        machine,
        build,
        tests,
        measure,
        kernels,
        tune,
        model,
        operators,
        compiled,
        fp8,
        plots,
        memory,
    )
}


def main() -> int:
    """Run one section; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SECTIONS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rows", help="run only these rows of the section")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    section = SectionRun(options.name, options.out, options.seconds, options.dry_run, options.rows)
    SECTIONS[options.name](section)
    return int(section.failed)


if __name__ == "__main__":
    sys.exit(main())
