"""What the GPU report's sections share and some of them do; dry runs of the cheap ones.

CI runs all of them dry (`.ci/run`).
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

import bench_model
import gpu_benchmarks
import gpu_part
import gpu_render
import gpu_sections
import gpu_targets
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pytest that a section starts is no worker of this one's: a worker does not time."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
        monkeypatch.delenv(name)


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN])
def interrupts(request: pytest.FixtureRequest) -> Iterator[None]:
    """As in a terminal, and as in the background of a shell, whose jobs inherit that."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_a_section_keeps_what_a_command_left_when_interrupted(tmp_path: Path) -> None:
    part = gpu_part.Part("x", tmp_path, 30, dry_run=True)
    code = """
import pathlib, sys, time
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path(sys.argv[1]).touch()
"""
    left = tmp_path / "left"
    assert not part.step("slow", [sys.executable, "-S", "-c", code, left], seconds=1)
    assert left.exists()
    found = json.loads((tmp_path / "x.json").read_text())
    assert found == {"cut_short": True, "notes": ["slow: interrupted after 1 s"]}
    assert not part.failed
    assert not part.step("wrong", [sys.executable, "-S", "-c", "raise SystemExit(2)"])
    assert part.failed


def found(tmp_path: Path) -> dict[str, Any]:
    """What section x has written."""
    return dict(json.loads((tmp_path / "x.json").read_text()))


@pytest.fixture
def few_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others take seconds to import, in each of the sessions that a test starts."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "pytest_benchmark.plugin")


@pytest.mark.usefixtures("few_plugins")
def test_no_test_that_passes_is_a_failure(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(
        "import pytest\n\n\n@pytest.mark.parametrize('i', [0, 1])\ndef test_it(i):\n    assert i\n"
    )
    part = gpu_part.Part("x", tmp_path, 300, dry_run=True)
    assert not part.pytest("one of two", [file]).well
    skipped = "import pytest\n\n\ndef test_it():\n    pytest.skip('no library')\n"
    file.write_text(skipped)
    part.failed = False
    assert part.pytest("skipped", [file]).well
    assert part.failed
    file.write_text("import nothing_of_this_name\n")
    part.pytest("no import", [file])
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
DEAF = "signal.signal(signal.SIGINT, signal.SIG_IGN)"


def cut_off(tmp_path: Path, part: gpu_part.Part, stop: str, *arguments: str) -> list[str]:
    """Run tests of which one hangs after `stop`; the section's notes."""
    file = tmp_path / "test_it.py"
    file.write_text(SLOW.replace("STOP", stop))
    assert not part.pytest("slow", [file, *arguments]).well
    tables = found(tmp_path)["tables"]
    (row,) = tables["tests"]
    assert row["passed"] >= 10
    assert row["failed"] == 1
    assert tables["tests that failed"][0]["message"].endswith("one is wrong")
    return list(found(tmp_path)["notes"])


@pytest.mark.parametrize("stop", ["pass", DEAF], ids=["interrupted", "killed"])
@pytest.mark.usefixtures("few_plugins")
def test_tests_that_are_cut_off_leave_the_outcomes_they_had(tmp_path: Path, stop: str) -> None:
    """Also where the interruption does not end them, as under a driver that hangs."""
    part = gpu_part.Part("x", tmp_path, 8, dry_run=True)
    start = time.monotonic()
    assert cut_off(tmp_path, part, stop) == ["slow: interrupted after 6 s"]
    assert time.monotonic() - start < 8
    assert found(tmp_path)["cut_short"]
    assert not part.failed, "what was not reached is no failure"


@pytest.mark.usefixtures("few_plugins")
@pytest.mark.parametrize("seconds", [8, 0.5], ids=["before the first ends", "before it starts"])
def test_tests_that_are_cut_off_at_once_have_not_failed(tmp_path: Path, seconds: float) -> None:
    file = tmp_path / "test_it.py"
    file.write_text("import time\n\n\ndef test_it():\n    time.sleep(60)\n")
    part = gpu_part.Part("x", tmp_path, seconds, dry_run=True)
    assert not part.pytest("slow", [file]).well
    section = found(tmp_path)
    assert section["cut_short"]
    assert len(section["notes"]) == 1, section["notes"]
    assert not part.failed


def test_parallel_tests_that_are_cut_off_leave_the_outcomes_they_had(tmp_path: Path) -> None:
    """pytest-xdist takes long to end, and here the controller is killed outright."""
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    part = gpu_part.Part("x", tmp_path, 300, dry_run=True)
    stop = "time.sleep(3); os.kill(os.getppid(), signal.SIGKILL)"
    assert cut_off(tmp_path, part, stop, *gpu_sections.in_parallel(2)) == ["slow: exit code -9"]


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


def bench(folder: Path, code: str, part: gpu_part.Part, keywords: str = "cpu") -> None:
    """Run `code` as benchmarks/bench_it.py of a checkout in `folder`."""
    file = folder / "benchmarks" / "bench_it.py"
    file.parent.mkdir(exist_ok=True)
    (folder / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\n")
    file.write_text(code)
    gpu_benchmarks.run_benchmarks(part, [file], keywords)


@pytest.mark.usefixtures("few_plugins")
def test_benchmarks_that_are_cut_off_leave_the_rows_they_had(tmp_path: Path) -> None:
    """In bf16 first; a row that does not fit the GPU's memory is a result."""
    bench(tmp_path, BENCH, gpu_part.Part("x", tmp_path, 300, dry_run=False))
    section = found(tmp_path)
    assert section["notes"] == ["x: cpu: exit code -9"]
    rows = section["tables"]["benchmarks"]
    assert [r["dtype"] for r in rows] == ["cpu-bfloat16-b"]
    assert all(r["median ms"] > 0 and r["peak GB"] == 3 for r in rows)
    assert section["tables"]["rows without a time"] == [
        {
            "reason": "out of memory: tried to allocate 80 GiB",
            "rows": "test_it[cpu-bfloat16-c]",
        }
    ]
    file = json.loads((tmp_path / "benchmarks" / "it_gpu.json").read_text())
    assert len(file["benchmarks"]) == len(rows)
    assert file["machine_info"]["cpu"]


@pytest.mark.usefixtures("few_plugins")
def test_single_rows_replace_their_own_and_keep_the_others(tmp_path: Path) -> None:
    code = BENCH.replace("os.kill(os.getpid(), signal.SIGKILL)", "pass")
    bench(tmp_path, code, gpu_part.Part("x", tmp_path, 300, dry_run=False))
    before = {r["dtype"]: r["median ms"] for r in found(tmp_path)["tables"]["benchmarks"]}
    assert list(before) == ["cpu-bfloat16-b", "cpu-last", "cpu-float32-a"]
    bench(tmp_path, code, gpu_part.Part("x", tmp_path, 300, False, rows="bfloat16"))
    section = found(tmp_path)
    assert section["tables"]["tests"][0]["passed"] == 1
    after = {r["dtype"]: r["median ms"] for r in section["tables"]["benchmarks"]}
    assert set(after) == set(before)
    assert {d for d in before if before[d] == after[d]} >= {"cpu-last", "cpu-float32-a"}
    only_large = gpu_part.Part("x", tmp_path, 300, False, rows="bfloat16-c")
    bench(tmp_path, code, only_large)
    assert not only_large.failed, "out of memory is an answer"


class FakeBenchmark:
    """Of pytest-benchmark, what a row touches."""

    disabled = True

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, call: Any, rounds: int, warmup_rounds: int) -> None:
        call()


def test_a_model_that_does_not_fit_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    freed = []
    row = next(r for r in bench_model.rows() if r.preset == "demo" and not r.training)

    def too_large(*arguments: Any) -> Any:
        large = torch.empty(1)
        weakref.finalize(large, freed.append, True)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB\nand more")

    monkeypatch.setattr(bench_model, "forward", too_large)
    monkeypatch.setattr(bench_model, "outcomes", lambda row: ([], []))
    with pytest.raises(pytest.skip.Exception) as skipped:
        bench_model.test_model(FakeBenchmark(), row)  # type: ignore[arg-type]
    assert str(skipped.value) == (
        f"{gpu_part.OUT_OF_MEMORY}: CUDA out of memory. Tried to allocate 80 GiB"
    )
    assert freed, "nothing refers to the row's tensors any more"
    assert skipped.value.__context__ is None, "nor does the exception"


def test_rounds_are_counted_by_single_calls() -> None:
    row = next(r for r in bench_model.rows() if r.preset == "demo" and not r.training)
    calls = []
    pretended = dataclasses.replace(row, device="cpu")
    rounds = bench_model._rounds(pretended, lambda: calls.append(time.sleep(0.5)))
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
def test_a_build_goes_on_without_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvcc: Any, cxx: int
) -> None:
    """Where nvcc fails or hangs: a fallback that worked is no failure, but is said first."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "dimr_fast").mkdir()
    script = SETUP.replace("NVCC", str(nvcc)).replace("CXX", str(cxx))
    (tmp_path / "setup.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", "before")
    monkeypatch.setenv("DIMR_FAST_SKIP_CUDA", "1")
    part = gpu_part.Part("x", tmp_path, 5, dry_run=False)
    part.fact("a", 1)
    gpu_sections.build_in_place(part, tmp_path)
    assert (tmp_path / "dimr_fast" / "kernels").resolve() == tmp_path / "kernels"
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(tmp_path), "before"]
    section = found(tmp_path)
    assert part.failed == bool(cxx)
    assert "cut_short" not in section
    assert (tmp_path / "built").exists() == bool(nvcc)
    warnings = section.get("warnings", [])
    assert ["CUDA library did not build" in text for text in warnings] == [True] * bool(nvcc)
    results = {"date": "", "minutes": 1, "dry_run": True, "targets": []}
    report = gpu_render.markdown(results | {"sections": {"x": section | {"status": "passed"}}})
    for text in warnings:
        assert report.index(text) < report.index("## Targets")


def test_a_memory_checkers_log() -> None:
    log = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at void dimr_fast::depthwise<float>(float*)+0x80 in a.cu:7
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized<float>(float*)+0x80
========= Invalid __shared__ write
=========     at _rms_norm_fwd_kernel+0x80 in b.py:3
========= ERROR SUMMARY: 3 errors
"""
    assert gpu_sections.sanitized(log) == {"summary": "3 errors", "in our kernels": 2}
    assert gpu_sections.sanitized("") == {"summary": "none", "in our kernels": 0}


def test_targets_name_what_the_models_benchmark_says() -> None:
    cases = [p.values[0] for p in bench_model.test_model.pytestmark[0].args[1]]
    row = dataclasses.replace(cases[0], training=True)
    assert (cases[0].title, row.title) == (gpu_targets.FORWARD, gpu_targets.TRAINING)
    assert gpu_targets.DEMO in bench_model.CONFIGS
    providers = {gpu_targets.OURS, gpu_targets.PUBLISHED, gpu_targets.COMPILED, gpu_targets.CLEAN}
    assert providers <= {*bench_model.FORWARD} & {*bench_model.TRAINING}
    labels = [dataclasses.replace(case, device=d).label for case in cases for d in ("cpu", "cuda")]
    on_cpu, on_gpu = gpu_sections.DRY_MODEL, gpu_sections.ON_GPU
    assert any(on_cpu in label for label in labels)
    assert any(on_gpu in label for label in labels)
    # What the section `compiled` selects by name, reports select by provider.
    for provider in {*bench_model.FORWARD, *bench_model.TRAINING}:
        label = dataclasses.replace(cases[0], provider=provider).label
        assert ("compile" in label) == ("compile" in provider)


def test_a_dry_run_end_to_end(tmp_path: Path) -> None:
    names = ["machine", "operators", "plots", "memory"]
    command = [sys.executable, str(BENCHMARKS / "gpu_report.py"), "--dry-run", "--only", *names]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (tmp_path / "report.md").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["sections"]) == names
    assert results["sections"]["machine"]["facts"]["GPU"] == "none"
    assert all("compute-sanitizer" in n for n in results["sections"]["memory"]["notes"])
    (file,) = (tmp_path / "benchmarks").iterdir()
    entries = json.loads(file.read_text())["benchmarks"]
    measured = {entry["extra_info"]["implementation"] for entry in entries}
    rows = results["sections"]["operators"]["tables"]["benchmarks"]
    assert {"reference"} <= measured == {r["implementation"] for r in rows}
    assert all(r["median ms"] > 0 for r in rows)
    assert f"## {names[0]}" in (tmp_path / "report.md").read_text()
