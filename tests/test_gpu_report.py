"""The GPU report: its driver on sections of our own, its judgement on numbers of our own, and dry
runs of its cheap sections. CI runs all of them (`.ci/run`).
"""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_model
import gpu_part
import gpu_render
import gpu_report
import gpu_sections
import gpu_targets
import pytest
from gpu_report import Section

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
WRITE = """
import json, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
def write(name, **found):
    (out / f"{name}.json").write_text(json.dumps(found))
"""


def section(name: str, code: str, share: float = 1) -> Section:
    """A section that finds `facts` or whatever else `code` writes."""
    return Section(name, share, (sys.executable, "-S", "-c", WRITE + code))


GOOD = section("good", "write('good', facts={'seen': 1}); print('all is well')")
FAILS = section("fails", "write('fails', facts={'first': 1}); print('why it failed'); sys.exit(3)")
CRASHES = section("crashes", "write('crashes', facts={'a': 1}); import os; os.abort()")
HANGS = section(
    "hangs",
    "write('hangs', facts={'until': 'then'}); import subprocess\n"
    "p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
    "write('hangs', facts={'child': p.pid}); time.sleep(60)",
)
HALF = section("half", "(out / 'half.json').write_text('{')")


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")")[-1].split()[0] != "Z"


def test_what_goes_wrong_costs_only_itself(tmp_path: Path) -> None:
    sections = [FAILS, CRASHES, HANGS, HALF, GOOD]
    start = time.monotonic()
    results = gpu_report.run(sections, tmp_path, minutes=0.1, dry_run=True)
    assert time.monotonic() - start < 8
    found = results["sections"]
    assert list(found) == ["fails", "crashes", "hangs", "half", "good"]
    assert found["fails"]["status"] == "failed: exit code 3"
    assert found["fails"]["log"] == ["why it failed"]
    assert found["crashes"]["status"] == "crashed: SIGABRT"
    assert found["hangs"]["status"].startswith("timed out after")
    assert [found[name]["facts"] for name in ("fails", "crashes")] == [{"first": 1}, {"a": 1}]
    assert not alive(found["hangs"]["facts"]["child"])
    assert found["half"]["status"] == found["good"]["status"] == "passed"
    assert "facts" not in found["half"]
    assert found["good"]["facts"] == {"seen": 1}
    assert "log" not in found["good"]
    assert (tmp_path / "good.log").read_text() == "all is well\n"
    report = (tmp_path / "report.md").read_text()
    assert "| crashes | crashed: SIGABRT |" in report
    assert "why it failed" in report
    assert "all is well" not in report
    on_disk = json.loads((tmp_path / "results.json").read_text())
    assert on_disk["sections"] == found


def test_minutes_are_a_limit_and_what_is_not_used_is_handed_on(tmp_path: Path) -> None:
    note = "write(NAME, facts={'limit': float(sys.argv[sys.argv.index('--seconds') + 1])})"
    sections = [
        section("first", note.replace("NAME", "'first'"), 3),
        section("hangs", "time.sleep(60)", 1),
        section("last", "write('last')", 1e-6),
    ]
    start = time.monotonic()
    found = gpu_report.run(sections, tmp_path, minutes=0.06, dry_run=True)["sections"]
    assert time.monotonic() - start < 5
    assert found["first"]["facts"]["limit"] == pytest.approx(0.75 * 3.6, rel=0.05)
    # Its own share of the whole would have been 0.9 s.
    assert found["hangs"]["seconds"] > 2
    assert found["last"] == {"status": "not reached"}
    assert "| last | not reached |" in (tmp_path / "report.md").read_text()


def test_only_keeps_what_was_there_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    kept = tmp_path / "benchmarks" / "kept.json"
    kept.touch()
    gpu_report.run([GOOD, FAILS], tmp_path, minutes=0.1, dry_run=True)
    assert not kept.exists(), "a whole run starts anew"
    kept.parent.mkdir()
    kept.touch()
    mended = section("fails", "write('fails', facts={'second': 2})")
    again = gpu_report.run([GOOD, mended], tmp_path, minutes=0.1, only=["fails"], dry_run=True)
    assert kept.exists()
    found = json.loads((tmp_path / "results.json").read_text())["sections"]
    assert found == again["sections"]
    assert list(found) == ["good", "fails"]
    assert found["good"]["facts"] == {"seen": 1}
    assert found["fails"]["facts"] == {"second": 2}
    assert "log" not in found["fails"]


def test_without_a_gpu_only_a_dry_run_goes_on(tmp_path: Path) -> None:
    machine = section("machine", "write('machine', facts={'GPU': 'none'})")
    statuses = {
        dry_run: gpu_report.run([machine, GOOD], tmp_path, minutes=0.1, dry_run=dry_run)
        for dry_run in (False, True)
    }
    assert statuses[False]["sections"]["good"] == {"status": "not reached"}
    assert statuses[True]["sections"]["good"]["status"] == "passed"


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


def test_no_test_that_passes_is_a_failure(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(
        "import pytest\n\n\n@pytest.mark.parametrize('i', [0, 1])\ndef test_it(i):\n    assert i\n"
    )
    part = gpu_part.Part("x", tmp_path, 30, dry_run=True)
    assert not part.pytest("one of two", [file])
    skipped = "import pytest\n\n\ndef test_it():\n    pytest.skip('no library')\n"
    file.write_text(skipped)
    part.failed = False
    assert part.pytest("skipped", [file])
    assert part.failed
    tables = json.loads((tmp_path / "x.json").read_text())["tables"]
    assert tables["tests"] == [
        {"tests": "one of two", "passed": 1, "failure": 1, "error": 0, "skipped": 0},
        {"tests": "skipped", "passed": 0, "failure": 0, "error": 0, "skipped": 1},
    ]
    (wrong,) = tables["tests that failed"]
    assert wrong["test"] == "test_it[0]"
    assert "assert 0" in wrong["message"]


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


def row(implementation: str, milliseconds: float, **facts: Any) -> dict[str, Any]:
    found = {"implementation": implementation, "median ms": milliseconds, "dtype": "bfloat16"}
    return found | facts


def synthetic() -> dict[str, Any]:
    """Rows as a GPU would leave them, of made-up times."""
    xl: dict[str, Any] = {"preset": "XL/2R", "batch": 64, "pass": "forward"}
    g = xl | {"preset": "G/2R"}
    one = xl | {"batch": 1}
    training = xl | {"pass": "training step"}
    norm: dict[str, Any] = {"operator": "td_rms_norm", "pass": "forward"}
    chain = {"operator": "depthwise_conv2d", "pass": "chain", "x": "64×32×32×480"}
    attention = {"operator": "attention", "pass": "forward", "x": "64×257×2880"}
    upsample = {"operator": "upsample_add", "pass": "forward", "x": "32×32×32×480"}
    model = [
        row("published", 400, **xl),
        row("ours", 100, **xl, **{"TFLOP/s": 500.0}),
        row("published", 600, **g),
        row("ours", 200, **g, **{"TFLOP/s": 480.0}),
        row("published, compiled", 149, **xl),
        row("published", 90, **one),
        row("published", 1, **xl) | {"preset": "demo"},
        row("ours", 1, **xl) | {"preset": "demo"},
        row("ours", 10, **one),
        row("ours", 300, **training, **{"peak GB": 61.0}),
        # Without its counterpart at this dtype.
        row("published", 1, **training) | {"dtype": "float32"},
    ]
    operators = [
        row("triton", 1, **norm, **{"GB/s": 2700.0}),
        row("triton", 1, **norm, **{"GB/s": 2850.0}),
        row("cuda", 1, **chain),
        row("reference", 2.5, **chain),
        row("triton", 1, **attention),
        row("triton", 1, **upsample),
        row("reference", 3.6, **upsample) | {"x": "another"},
    ]
    published = {"backend": "published", "x": "64×257×2880", "pass": "forward", "median ms": 4.0}
    ceilings = [
        {"what": "copy", "median ms": 1.0, "GB/s": 3000.0},
        {"what": "M=8192 N=8192 K=8192", "TFLOP/s": 800.0, "GB/s": 1.0},
    ]
    tables = {
        "measure": {"ceilings": ceilings, "SDPA": [published]},
        "model": {"benchmarks": model},
        "operators": {"benchmarks": operators},
    }
    return {
        "date": "2000-01-01T00:00:00+00:00",
        "minutes": 9,
        "dry_run": False,
        "sections": {
            name: {"status": "passed", "seconds": 1.0, "tables": t} for name, t in tables.items()
        },
    }


def test_targets_are_judged_by_their_worst_row() -> None:
    results = synthetic()
    judged = {r["target"]: (r["verdict"], r["measured"]) for r in gpu_targets.judge(results)}
    measured = {target: answer for target, answer in judged.items() if answer[1] is not None}
    assert measured == {
        "sampling, batch ≥ 64, against published eager": ("met", 3.0),
        "… against torch.compile of it": ("missed", 1.49),
        "sampling, batch 1, against published eager": ("met", 9.0),
        "sampling, batch ≥ 64, share of the GEMM rate": ("met", pytest.approx(60)),
        "training peak memory, XL/2R, batch 64": ("missed", 61.0),
        "norm kernels, share of copy bandwidth": ("met", pytest.approx(90)),
        "attention with casts and pads, against published": ("met", 4.0),
        "depthwise + residual + norm against cuDNN + add + norm": ("met", 2.5),
    }
    others = {verdict for verdict, value in judged.values() if value is None}
    assert others == {"not measured"}
    for aim, verdict in ((40.0, "met, and its aim"), (60.0, "met"), (60.1, "missed")):
        rows = results["sections"]["model"]["tables"]["benchmarks"]
        next(r for r in rows if "peak GB" in r)["peak GB"] = aim
        verdicts = {r["target"]: r["verdict"] for r in gpu_targets.judge(results)}
        assert verdicts["training peak memory, XL/2R, batch 64"] == verdict
    results["dry_run"] = True
    assert {r["verdict"] for r in gpu_targets.judge(results)} == {"not measured"}


def test_targets_name_what_the_benchmarks_say() -> None:
    """Operators, passes and implementations are those of the operators' rows."""
    import bench_depthwise_conv2d

    from dimr_fast.ops import OPERATORS

    assert "chain" in bench_depthwise_conv2d.GRADIENT_OF
    for operator, implementation in (
        ("depthwise_conv2d", "cuda"),
        ("upsample_add", "triton"),
        ("attention", "triton"),
        ("td_rms_norm", "triton"),
    ):
        assert implementation in OPERATORS[operator].names


def test_targets_name_what_the_models_benchmark_says() -> None:
    cases = [p.values[0] for p in bench_model.test_model.pytestmark[0].args[1]]
    row = dataclasses.replace(cases[0], training=True)
    assert (cases[0].title, row.title) == (gpu_targets.FORWARD, gpu_targets.TRAINING)
    assert gpu_targets.DEMO in bench_model.CONFIGS
    providers = {gpu_targets.OURS, gpu_targets.PUBLISHED, gpu_targets.COMPILED, gpu_targets.CLEAN}
    assert providers <= {*bench_model.FORWARD} & {*bench_model.TRAINING}
    labels = [dataclasses.replace(case, device=d).label for case in cases for d in ("cpu", "cuda")]
    (dry,) = gpu_sections.DRY_MODEL
    for keywords in (dry, *gpu_sections.MODEL):
        for word in keywords.replace("not ", "").split(" and "):
            assert any(word in label for label in labels), keywords


def test_the_report_reads_well(tmp_path: Path) -> None:
    results = synthetic()
    results["sections"]["measure"]["notes"] = ["a note"]
    results["sections"]["plots"] = {
        "status": "passed",
        "tables": {"plots": [{"file": "model.png"}]},
    }
    gpu_render.render(results, tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "| training peak memory, XL/2R, batch 64 | ≤ 60 GB | 40 GB | 61 | 1 | missed |" in report
    assert "| what | median ms | GB/s | TFLOP/s |" in report
    assert "| M=8192 N=8192 K=8192 |  | 1 | 800 |" in report
    assert "- a note" in report
    assert "![model.png](model.png)" in report
    order = [report.index(f"\n## {name}\n") for name in ("Targets", "Sections", "measure", "plots")]
    assert order == sorted(order)
    assert not list(tmp_path.glob(".*")), "nothing unfinished is left"


def test_a_dry_run_end_to_end(tmp_path: Path) -> None:
    names = ["machine", "memory", "operators", "plots"]
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


def test_every_section_has_its_action() -> None:
    assert [s.name for s in gpu_report.SECTIONS] == list(gpu_sections.SECTIONS)
