"""Tests of the GPU report's sections, and dry runs of the short ones.

`.ci/run` runs all of them dry.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import render, sections, targets
from benchmarks.gpu.benchmark_session import run_benchmarks
from benchmarks.gpu.section_run import SectionRun
from benchmarks.model import bench_model
from benchmarks.utils import names
from benchmarks.utils.files import ROOT
from dimr_fast.ops import OPERATORS


@pytest.fixture(autouse=True)
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide pytest-xdist from the sessions that sections start: its workers do not time."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
        monkeypatch.delenv(name)


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN])
def interrupts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Handle SIGINT as in a terminal, and ignore it as in background jobs of a shell."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupted_command_can_save_its_results(tmp_path: Path) -> None:
    section = SectionRun("x", tmp_path, 30, dry_run=True)
    code = """
import pathlib, sys, time
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path(sys.argv[1]).touch()
"""
    left = tmp_path / "left"
    assert not section.run_command("slow", [sys.executable, "-S", "-c", code, left], seconds=1)
    assert left.exists()
    found = json.loads((tmp_path / "x.json").read_text())
    assert found == {"cut_short": True, "notes": ["slow: interrupted after 1 s"]}
    assert not section.failed
    assert not section.run_command("wrong", [sys.executable, "-S", "-c", "raise SystemExit(2)"])
    assert section.failed


def found(tmp_path: Path) -> dict[str, Any]:
    """Return what section x has written."""
    return dict(json.loads((tmp_path / "x.json").read_text()))


@pytest.fixture
def few_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load only one plugin in started sessions: the others take seconds to import."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "pytest_benchmark.plugin")


@pytest.mark.usefixtures("few_plugins")
def test_a_section_fails_if_no_test_passes(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(
        "import pytest\n\n\n@pytest.mark.parametrize('i', [0, 1])\ndef test_it(i):\n    assert i\n"
    )
    section = SectionRun("x", tmp_path, 300, dry_run=True)
    assert not section.run_pytest("one of two", [file]).passed
    skipped = "import pytest\n\n\ndef test_it():\n    pytest.skip('no library')\n"
    file.write_text(skipped)
    section.failed = False
    assert section.run_pytest("skipped", [file]).passed
    assert section.failed
    file.write_text("import nothing_of_this_name\n")
    section.run_pytest("no import", [file])
    tables = found(tmp_path)["tables"]
    assert tables["tests"] == [
        {"tests": "one of two", "passed": 1, "failed": 1, "error": 0, "skipped": 0},
        {"tests": "skipped", "passed": 0, "failed": 0, "error": 0, "skipped": 1},
        {"tests": "no import", "passed": 0, "failed": 0, "error": 1, "skipped": 0},
    ]
    wrong, broken = tables["tests that failed"]
    assert wrong["test"].endswith("test_it[0]")
    assert "assert 0" in wrong["message"]
    assert "nothing_of_this_name" in broken["message"]


SLOW = """
import os, signal, time
import pytest

@pytest.mark.parametrize("i", range(40))
def test_it(i):
    assert i != 1, "one is wrong"
    if i == 29:
        STOP
        time.sleep(60)
"""
IGNORE_SIGINT = "signal.signal(signal.SIGINT, signal.SIG_IGN)"


def cut_off(tmp_path: Path, section: SectionRun, stop: str, *arguments: str) -> list[str]:
    """Run tests of which one hangs after `stop`; return the section's notes."""
    file = tmp_path / "test_it.py"
    file.write_text(SLOW.replace("STOP", stop))
    assert not section.run_pytest("slow", [file, *arguments]).passed
    tables = found(tmp_path)["tables"]
    (row,) = tables["tests"]
    assert row["passed"] >= 10
    assert row["failed"] == 1
    assert tables["tests that failed"][0]["message"].endswith("one is wrong")
    return list(found(tmp_path)["notes"])


@pytest.mark.parametrize("stop", ["pass", IGNORE_SIGINT], ids=["interrupted", "killed"])
@pytest.mark.usefixtures("few_plugins")
def test_interrupted_tests_leave_their_outcomes(tmp_path: Path, stop: str) -> None:
    """This includes tests that ignore the interruption, as under a driver that hangs."""
    section = SectionRun("x", tmp_path, 8, dry_run=True)
    start = time.monotonic()
    assert cut_off(tmp_path, section, stop) == ["slow: interrupted after 6 s"]
    assert time.monotonic() - start < 8
    assert found(tmp_path)["cut_short"]
    assert not section.failed, "what was not reached is no failure"


@pytest.mark.usefixtures("few_plugins")
@pytest.mark.parametrize("seconds", [8, 0.5], ids=["before the first ends", "before it starts"])
def test_interrupted_tests_without_outcomes_are_no_failure(tmp_path: Path, seconds: float) -> None:
    file = tmp_path / "test_it.py"
    file.write_text("import time\n\n\ndef test_it():\n    time.sleep(60)\n")
    section = SectionRun("x", tmp_path, seconds, dry_run=True)
    assert not section.run_pytest("slow", [file]).passed
    assert found(tmp_path)["cut_short"]
    assert len(found(tmp_path)["notes"]) == 1, found(tmp_path)["notes"]
    assert not section.failed


def test_killed_parallel_tests_leave_their_outcomes(tmp_path: Path) -> None:
    """The controller of pytest-xdist is killed without a chance to write."""
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    section = SectionRun("x", tmp_path, 300, dry_run=True)
    stop = "time.sleep(3); os.kill(os.getppid(), signal.SIGKILL)"
    assert cut_off(tmp_path, section, stop, *sections.in_parallel(2)) == ["slow: exit code -9"]


BENCH = """
import os, signal
import pytest

@pytest.mark.parametrize("name", ["cpu-float32-a", "cpu-bfloat16-b", "cpu-bfloat16-c", "cpu-last"])
def test_it(benchmark, name):
    if name.endswith("c"):
        pytest.skip("out of memory: tried to allocate 80 GiB")
    if name == "cpu-last":
        os.kill(os.getpid(), signal.SIGKILL)
    benchmark.extra_info.update(implementation="ours", dtype=name, calls=2)
    benchmark.pedantic(lambda: None, rounds=3)
    benchmark.extra_info["peak_bytes"] = 3_000_000_000
"""


def bench(folder: Path, code: str, section: SectionRun, keywords: str = "cpu") -> None:
    """Run `code` as benchmarks/bench_it.py of a checkout in `folder`."""
    file = folder / "benchmarks" / "bench_it.py"
    file.parent.mkdir(exist_ok=True)
    (folder / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\n")
    file.write_text(code)
    run_benchmarks(section, [file], keywords)


@pytest.mark.usefixtures("few_plugins")
def test_killed_benchmarks_leave_their_rows(tmp_path: Path) -> None:
    """Rows in bf16 run first. A row that does not fit into memory is a result."""
    bench(tmp_path, BENCH, SectionRun("x", tmp_path, 300, dry_run=False))
    findings = found(tmp_path)
    assert findings["notes"] == ["x: cpu: exit code -9"]
    rows = findings["tables"]["benchmarks"]
    assert [r["dtype"] for r in rows] == ["cpu-bfloat16-b"]
    assert all(r["median ms"] > 0 and r["peak GB"] == 3 for r in rows)
    assert findings["tables"]["rows without a time"] == [
        {
            "reason": "out of memory: tried to allocate 80 GiB",
            "rows": "test_it[cpu-bfloat16-c]",
        }
    ]
    file = json.loads((tmp_path / "benchmarks" / "it_gpu.json").read_text())
    assert len(file["benchmarks"]) == len(rows)
    assert file["machine_info"]["cpu"]


@pytest.mark.usefixtures("few_plugins")
def test_chosen_rows_replace_earlier_ones_and_keep_the_others(tmp_path: Path) -> None:
    code = BENCH.replace("os.kill(os.getpid(), signal.SIGKILL)", "pass")
    bench(tmp_path, code, SectionRun("x", tmp_path, 300, dry_run=False))
    before = {r["dtype"]: r["median ms"] for r in found(tmp_path)["tables"]["benchmarks"]}
    assert list(before) == ["cpu-bfloat16-b", "cpu-last", "cpu-float32-a"]
    bench(tmp_path, code, SectionRun("x", tmp_path, 300, False, rows="bfloat16"))
    findings = found(tmp_path)
    assert findings["tables"]["tests"][0]["passed"] == 1
    after = {r["dtype"]: r["median ms"] for r in findings["tables"]["benchmarks"]}
    assert set(after) == set(before)
    assert {d for d in before if before[d] == after[d]} >= {"cpu-last", "cpu-float32-a"}
    only_large = SectionRun("x", tmp_path, 300, False, rows="bfloat16-c")
    bench(tmp_path, code, only_large)
    assert not only_large.failed, "out of memory is an answer"


class FakeBenchmark:
    """The part of pytest-benchmark's fixture that a row uses."""

    disabled = True

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, call: Any, rounds: int, warmup_rounds: int) -> None:
        call()


def test_a_model_that_does_not_fit_is_a_result() -> None:
    freed = []
    row = next(r for r in bench_model.rows() if r.preset == "demo" and not r.training)

    def too_large(*arguments: Any) -> Any:
        large = torch.empty(1)
        weakref.finalize(large, freed.append, True)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB\nand more")

    with pytest.raises(pytest.skip.Exception) as skipped:
        bench_model.measure_or_skip(FakeBenchmark(), row, too_large)  # type: ignore[arg-type]
    assert str(skipped.value) == (
        f"{names.OUT_OF_MEMORY}: CUDA out of memory. Tried to allocate 80 GiB"
    )
    assert freed, "nothing refers to the row's tensors any more"
    assert skipped.value.__context__ is None, "nor does the exception"


def test_rounds_are_counted_by_single_calls() -> None:
    row = next(r for r in bench_model.rows() if r.preset == "demo" and not r.training)
    calls = []
    pretended = dataclasses.replace(row, device="cpu")
    rounds = bench_model.rounds(pretended, lambda: calls.append(time.sleep(0.5)))
    assert len(calls) == 3
    assert rounds == round(bench_model.SECONDS["cpu"] / 0.5)


SETUP = """
import os, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--build-lib") + 1], "built")
if os.environ["DIMR_FAST_FORCE_CUDA"] == "1":
    assert os.environ["DIMR_FAST_SKIP_CUDA"] != "1"
    sys.exit(NVCC)
assert os.environ["DIMR_FAST_SKIP_CUDA"] == "1"
out.touch()
sys.exit(CXX)
"""


@pytest.mark.parametrize(
    ("nvcc", "cxx"), [(0, 0), (1, 0), (1, 1), ("__import__('time').sleep(60)", 0)]
)
def test_a_build_continues_without_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvcc: Any, cxx: int
) -> None:
    """If nvcc fails or hangs, the CPU library is built, and the report starts with a warning."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "dimr_fast").mkdir()
    script = SETUP.replace("NVCC", str(nvcc)).replace("CXX", str(cxx))
    (tmp_path / "setup.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", "before")
    monkeypatch.setenv("DIMR_FAST_SKIP_CUDA", "1")
    section = SectionRun("x", tmp_path, 5, dry_run=False)
    section.add_fact("a", 1)
    sections.build_in_place(section, tmp_path)
    assert (tmp_path / "dimr_fast" / "kernels").resolve() == tmp_path / "kernels"
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(tmp_path), "before"]
    findings = found(tmp_path)
    assert section.failed == bool(cxx)
    assert "cut_short" not in findings
    assert (tmp_path / "built").exists() == bool(nvcc)
    warnings = findings.get("warnings", [])
    assert ["CUDA library did not build" in text for text in warnings] == [True] * bool(nvcc)
    results = {"date": "", "minutes": 1, "dry_run": True, "targets": []}
    report = render.markdown(results | {"sections": {"x": findings | {"status": "passed"}}})
    for text in warnings:
        assert report.index(text) < report.index("## Targets")


def test_a_sanitizer_log_is_parsed() -> None:
    log = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at void dimr_fast::depthwise<float>(float*)+0x80 in a.cu:7
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized<float>(float*)+0x80
========= Invalid __shared__ write
=========     at _rms_norm_fwd_kernel+0x80 in b.py:3
========= ERROR SUMMARY: 3 errors
"""
    assert sections.parse_sanitizer_log(log) == {"summary": "3 errors", "in our kernels": 2}
    assert sections.parse_sanitizer_log("") == {"summary": "none", "in our kernels": 0}


def test_targets_and_sections_select_rows_by_the_names_in_the_benchmark() -> None:
    cases = [p.values[0] for p in bench_model.test_model.pytestmark[0].args[1]]
    assert targets.DEMO in bench_model.CONFIGS
    labels = [dataclasses.replace(case, device=d).label for case in cases for d in ("cpu", "cuda")]
    on_cpu, on_gpu = sections.DRY_MODEL, sections.ON_GPU
    assert any(on_cpu in label for label in labels)
    assert any(on_gpu in label for label in labels)
    # Section `compiled` selects rows by name, reports select them by provider.
    for provider in (*names.PROVIDERS, *names.FP8_PROVIDERS):
        label = dataclasses.replace(cases[0], provider=provider).label
        assert ("compile" in label) == ("compile" in provider)


def test_a_dry_run_end_to_end(tmp_path: Path) -> None:
    wanted = ["machine", "operators", "plots", "memory"]
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--only", *wanted], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (tmp_path / "report.md").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["sections"]) == wanted
    assert results["sections"]["machine"]["facts"]["GPU"] == "none"
    assert all("compute-sanitizer" in n for n in results["sections"]["memory"]["notes"])
    (file,) = (tmp_path / "benchmarks").iterdir()
    entries = json.loads(file.read_text())["benchmarks"]
    measured = {entry["extra_info"]["implementation"] for entry in entries}
    rows = results["sections"]["operators"]["tables"]["benchmarks"]
    assert {"reference"} <= measured == {r["implementation"] for r in rows}
    assert all(r["median ms"] > 0 for r in rows)
    assert f"## {wanted[0]}" in (tmp_path / "report.md").read_text()


def test_the_tests_that_sections_run_exist() -> None:
    """`find_test` fails if a name is missing or ambiguous."""
    *files, single = sections.kernel_tests()
    assert len(files) == 13
    path, _, name = str(single).partition("::")
    assert f"def {name}(" in Path(path).read_text()
    sections.find_test("test_depthwise_conv2d_gpu")


def test_kernel_section_runs_the_tests_of_every_triton_operator() -> None:
    files = {Path(str(file).partition("::")[0]).stem for file in sections.kernel_tests()}
    operators = {name for name, operator in OPERATORS.items() if "triton" in operator.names}
    assert {f"test_{name}" for name in operators} <= files
