"""The driver of the GPU report, with scripted sections."""

import dataclasses
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import run as gpu_run
from benchmarks.gpu import sections
from benchmarks.gpu.run import Section
from benchmarks.utils.files import BENCHMARKS, ROOT

PAGE = (BENCHMARKS / "README.md").read_text()
WRITE = """
import json, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
def write(name, **found):
    (out / f"{name}.json").write_text(json.dumps(found))
"""


def section(name: str, code: str, seconds: float = 1) -> Section:
    """Return a section that runs `code`, which may write findings."""
    return Section(name, seconds, (sys.executable, "-S", "-c", WRITE + code))


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


def test_a_failing_section_does_not_affect_the_others(tmp_path: Path) -> None:
    planned = [FAILS, CRASHES, HANGS, HALF, GOOD]
    start = time.monotonic()
    results = gpu_run.run(planned, tmp_path, minutes=0.1, dry_run=True)
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


def test_minutes_are_a_limit_and_unused_time_goes_to_later_sections(tmp_path: Path) -> None:
    note = "write(NAME, facts={'limit': float(sys.argv[sys.argv.index('--seconds') + 1])})"
    planned = [
        section("first", note.replace("NAME", "'first'"), 1.5),
        section("hangs", "time.sleep(60)", 0.5),
        section("last", "write('last')", 1e-6),
    ]
    start = time.monotonic()
    found = gpu_run.run(planned, tmp_path, minutes=0.06, dry_run=True)["sections"]
    assert time.monotonic() - start < 5
    assert found["first"]["facts"]["limit"] == pytest.approx(0.75 * 3.6, rel=0.05)
    # Without the time that the first section left, its limit would have been 0.9 s.
    assert found["hangs"]["seconds"] > 2
    assert found["last"] == {"status": "not reached"}
    assert "| last | not reached |" in (tmp_path / "report.md").read_text()


def test_with_too_little_time_the_first_sections_get_their_plan(tmp_path: Path) -> None:
    note = "write(NAME, facts={'limit': float(sys.argv[sys.argv.index('--seconds') + 1])})"
    planned = [section(name, note.replace("NAME", repr(name)), 4) for name in ("one", "two")]
    planned.insert(1, section("between", "time.sleep(60)", 4))
    found = gpu_run.run(planned, tmp_path, minutes=0.08, dry_run=True)["sections"]
    assert found["one"]["facts"]["limit"] == 4
    assert found["between"]["status"] == "timed out after 4 s"
    assert found["two"] == {"status": "not reached"}


def test_only_keeps_the_results_of_other_sections(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    kept = tmp_path / "benchmarks" / "kept.json"
    kept.touch()
    gpu_run.run([GOOD, FAILS], tmp_path, minutes=0.1, dry_run=True)
    assert not kept.exists(), "a whole run starts anew"
    kept.parent.mkdir()
    kept.touch()
    mended = section("fails", "write('fails', facts={'second': 2})")
    again = gpu_run.run([GOOD, mended], tmp_path, minutes=0.1, only={"fails": None}, dry_run=True)
    assert kept.exists()
    found = json.loads((tmp_path / "results.json").read_text())["sections"]
    assert found == again["sections"]
    assert list(found) == ["good", "fails"]
    assert found["good"]["facts"] == {"seen": 1}
    assert found["fails"]["facts"] == {"second": 2}
    assert "log" not in found["fails"]


def test_without_a_gpu_only_a_dry_run_continues(tmp_path: Path) -> None:
    machine = section("machine", "write('machine', facts={'GPU': 'none'})")
    statuses = {
        dry_run: gpu_run.run([machine, GOOD], tmp_path, minutes=0.1, dry_run=dry_run)
        for dry_run in (False, True)
    }
    assert statuses[False]["sections"]["good"] == {"status": "not reached"}
    assert statuses[True]["sections"]["good"]["status"] == "passed"


def test_a_section_receives_the_chosen_rows(tmp_path: Path) -> None:
    tells = section("tells", "write('tells', facts={'rows': sys.argv[-1]})")
    wanted = {"tells": "XL/2R and ours"}
    found = gpu_run.run([tells], tmp_path, minutes=0.1, only=wanted, dry_run=True)["sections"]
    assert found["tells"]["facts"] == {"rows": "XL/2R and ours"}


def test_the_build_runs_first_if_it_is_missing(tmp_path: Path) -> None:
    """It runs only if a section needs it. Every run states its machine."""
    machine, build, plots = (
        dataclasses.replace(section(name, code), needs_build=False)
        for name, code in (
            ("machine", "write('machine', facts={'GPU': 'Fast GPU'})"),
            ("build", ""),
            ("plots", ""),
        )
    )

    def names(built: bool, *only: str) -> list[str]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        chosen = dict.fromkeys(only)
        found = gpu_run.run(
            [machine, build, GOOD, plots],
            tmp_path / "out",
            minutes=0.1,
            only=chosen,
            built=lambda: built,
        )
        assert {s["GPU"] for s in found["sections"].values()} == {"Fast GPU"}
        return list(found["sections"])

    assert names(False, "good") == ["machine", "build", "good"]
    assert names(True, "good") == ["machine", "good"]
    assert names(False, "plots") == ["machine", "plots"]
    assert names(True) == ["machine", "build", "good", "plots"]


def test_is_built_requires_kernels_and_libraries(tmp_path: Path) -> None:
    for name in ("kernels", "libdimr_fast_cpu.so", "_built.json"):
        assert not gpu_run.is_built(tmp_path)
        (tmp_path / name).touch()
    assert gpu_run.is_built(tmp_path)


def test_a_run_resumes_from_an_archive(tmp_path: Path) -> None:
    """The other machine has neither the results nor the tuned configurations."""
    archive, installed = tmp_path / "back" / "gpu.tar.gz", tmp_path / "installed"
    installed.mkdir()
    options: dict[str, Any] = {"minutes": 0.1, "configurations": installed}
    tunes = section(
        "tune",
        "(out / 'configurations').mkdir(); (out / '.scratch').touch()\n"
        "(out / 'configurations' / 'Fast_GPU.json').write_text('{}')\n"
        "write('tune', facts={'a': 1})",
    )
    gpu_run.run([tunes, FAILS], tmp_path / "first", archive=archive, **options)
    with tarfile.open(archive) as packed:
        assert "configurations/Fast_GPU.json" in packed.getnames()
        assert not [name for name in packed.getnames() if "/." in f"/{name}"]
    assert not list(installed.iterdir())
    only: dict[str, str | None] = {"good": None}
    planned = [tunes, FAILS, GOOD]
    again = tmp_path / "again"
    found = gpu_run.run(planned, again, only=only, resume=archive, **options)["sections"]
    assert list(found) == ["tune", "fails", "good"]
    assert found["tune"]["facts"] == {"a": 1}
    assert [file.name for file in installed.iterdir()] == ["Fast_GPU.json"]
    assert (again / "tune.log").exists()
    missing = tmp_path / "missing.tar.gz"
    alone = gpu_run.run(planned, tmp_path / "alone", only=only, resume=missing, **options)
    assert list(alone["sections"]) == ["good"]


def test_a_killed_run_leaves_its_archive(tmp_path: Path) -> None:
    code = f"""
import pathlib, sys
from benchmarks.gpu import run
sleeps = (sys.executable, "-S", "-c", "import time; time.sleep(60)")
sections = [
    run.Section("good", 5, {GOOD.command!r}),
    run.Section("hangs", 5, sleeps),
]
here = pathlib.Path({str(tmp_path)!r})
run.run(sections, here / "out", minutes=1, archive=here / "gpu.tar.gz", dry_run=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while "hangs" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGKILL)
    with tarfile.open(tmp_path / "gpu.tar.gz") as packed:
        report = packed.extractfile("report.md")
        assert report is not None
        assert "| good | passed |" in report.read().decode()


def test_every_planned_section_is_implemented() -> None:
    assert [s.name for s in gpu_run.SECTIONS] == list(sections.SECTIONS)


def test_the_page_states_the_planned_time_of_each_section() -> None:
    for planned in gpu_run.SECTIONS:
        assert re.search(rf"^\| {planned.name} \| {planned.seconds:g} \| ", PAGE, re.M), planned


def test_the_calls_on_the_page_have_enough_minutes() -> None:
    """Each has time for its sections and the build; together they run every section."""
    seconds = {planned.name: planned.seconds for planned in gpu_run.SECTIONS}
    commands = re.findall(r"^python -m benchmarks.gpu.run (.*--only.*)$", PAGE, re.M)
    run = []
    for command in commands:
        words = shlex.split(command)
        only = words[words.index("--only") + 1 :]
        minutes = float(words[words.index("--minutes") + 1])
        if ":" in only[0]:
            continue  # single rows
        run.append(only)
        needed = {"machine", "build", *only}
        assert sum(seconds[name] for name in needed) == 60 * minutes <= 540, command
    assert {name for only in run for name in only} | {"machine"} == set(seconds)
    assert [only for only in run if "memory" in only] == [["memory"]]
