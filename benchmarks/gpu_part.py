"""What a section of the GPU report has found, on disk after each addition; what sections share."""

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from gpu_render import write_whole

ROOT = Path(__file__).parent.parent
SHOWN = 30
"""Failed tests that the report shows."""
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
GRACE = 20.0
"""Seconds that an interrupted command has to end: pytest-xdist takes 12."""
OUT_OF_MEMORY = "out of memory"
"""How the reason of a benchmark's row begins that does not fit the GPU: a result, no failure."""

Rows = list[dict[str, Any]]


class Tests(NamedTuple):
    """What a run of pytest left: `well` if it ended with 0, each test's outcome, benchmarks."""

    well: bool
    outcomes: Rows
    benchmarks: dict[str, Any] | None


class Part:
    """What a section has found: facts, tables of rows, notes. On disk after each addition."""

    def __init__(
        self, name: str, out: Path, seconds: float, dry_run: bool, rows: str | None = None
    ) -> None:
        self.name, self.out, self.dry_run = name, out, dry_run
        self.chosen = rows
        # What is interrupted takes a moment to end, and the section to write what it left.
        self.grace = min(GRACE, seconds / 5)
        self.end = time.monotonic() + seconds - self.grace - min(5.0, seconds / 20)
        self.failed = False
        self._interrupted = False
        self._found: dict[str, Any] = {}

    def left(self) -> float:
        """Seconds until this section should end by itself."""
        return self.end - time.monotonic()

    def fact(self, name: str, value: Any) -> None:
        self._found.setdefault("facts", {})[name] = value
        self._save()

    def rows(self, table: str, rows: Rows) -> None:
        self._found.setdefault("tables", {}).setdefault(table, []).extend(rows)
        self._save()

    def note(self, text: str) -> None:
        self._found.setdefault("notes", []).append(text)
        self._save()

    def warn(self, text: str) -> None:
        """Put `text` at the top of the report."""
        self._found.setdefault("warnings", []).append(text)
        self._save()

    def fail(self, reason: str) -> None:
        self.failed = True
        self.note(reason)

    def cut_short(self, reason: str) -> None:
        self._found["cut_short"] = True
        self.note(reason)

    def _save(self) -> None:
        write_whole(self.out / f"{self.name}.json", json.dumps(self._found, indent=1) + "\n")

    def step(
        self,
        title: str,
        command: Sequence[str | Path],
        *,
        seconds: float = float("inf"),
        environment: Mapping[str, str] | None = None,
        folder: Path = ROOT,
        optional: bool = False,
    ) -> bool:
        """Run a command, in the checkout unless said; whether it ended, and with 0.

        What takes longer than `seconds`, or than is left, is interrupted as Ctrl-C does, to which
        pytest and the tuner answer by leaving what they have. Another exit code than 0 fails the
        section. Of an `optional` command, either is only noted.
        """
        limit = min(seconds, self.left())
        self._interrupted = limit < 0.5
        if self._interrupted:
            self.cut_short(f"{title}: not started, no time was left")
            return False
        print(f"+ {shlex.join(map(str, command))}", flush=True)
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # A shell's background jobs, and so the command, would not notice the interruption.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(command, cwd=folder, env={**os.environ, **(environment or {})})
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            self._interrupted = True
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(self.grace)
            process.kill()
            # One that waits for a driver does not even then end, and what it left is still wanted.
            with suppress(subprocess.TimeoutExpired):
                process.wait(2)
            (self.note if optional else self.cut_short)(f"{title}: interrupted after {limit:.0f} s")
            return False
        if code != 0:
            (self.note if optional else self.fail)(f"{title}: exit code {code}")
        return code == 0

    def pytest(
        self,
        title: str,
        arguments: Sequence[str | Path],
        *,
        under: Sequence[str | Path] = (),
        seconds: float = float("inf"),
        environment: Mapping[str, str] | None = None,
    ) -> Tests:
        """Run tests, and say how many passed and which did not.

        That none passed is a failure, unless the run was cut off before.
        `under` is a command that runs another, pytest here. However the run ends, the outcomes of
        the tests that had ended are kept.
        """
        with tempfile.TemporaryDirectory() as scratch:
            paths = [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
            plugin = {
                "GPU_OUTCOMES": scratch,
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            }
            well = self.step(
                title,
                [*under, *PYTEST, "-p", "gpu_outcomes", *arguments],
                seconds=seconds,
                environment={**(environment or {}), **plugin},
            )
            tests, benchmarks = Path(scratch, "tests.jsonl"), Path(scratch, "benchmarks.json")
            lines = tests.read_text().splitlines() if tests.is_file() else []
            outcomes = [json.loads(line) for line in lines]
            report = json.loads(benchmarks.read_text()) if benchmarks.is_file() else None
        self._count(title, outcomes)
        return Tests(well, outcomes, report)

    def _count(self, title: str, outcomes: Rows) -> None:
        counts = dict.fromkeys(("passed", "failed", "error", "skipped"), 0)
        for entry in outcomes:
            counts[entry["outcome"]] += 1
        self.rows("tests", [{"tests": title} | counts])
        wrong = [entry for entry in outcomes if entry["outcome"] in ("failed", "error")]
        if wrong:
            self.rows(
                "tests that failed",
                [{"test": entry["test"], "message": entry["reason"]} for entry in wrong[:SHOWN]],
            )
        passed = any(
            entry["outcome"] == "passed" or entry["reason"].startswith(OUT_OF_MEMORY)
            for entry in outcomes
        )
        # Of tests that were not reached nothing is known.
        if not passed and not self._interrupted:
            self.fail(f"{title}: no test passed")


def nvidia_smi(fields: str, meanwhile: Callable[[], object] | None = None) -> dict[str, str]:
    """The first GPU's values of these comma-separated fields, none without nvidia-smi.

    `meanwhile` is called again and again until the answer is there.
    """
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    end = time.monotonic() + 20
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except OSError:
        return {}
    with process:
        while meanwhile and process.poll() is None and time.monotonic() < end:
            meanwhile()
        try:
            answer, _ = process.communicate(timeout=max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            return {}
    values = answer.splitlines()[0].split(",") if process.returncode == 0 else []
    return dict(zip(fields.split(","), map(str.strip, values), strict=False))


def times(milliseconds: Sequence[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentiles."""
    data = list(milliseconds)
    deciles = statistics.quantiles(data, n=10, method="inclusive") if len(data) > 1 else data * 9
    return {"median ms": statistics.median(data), "p20 ms": deciles[1], "p80 ms": deciles[7]}


def rates(milliseconds: float, moved: int, flops: int) -> dict[str, float]:
    """GB/s of these bytes and TFLOP/s, of what is counted."""
    found = {}
    if moved:
        found["GB/s"] = 1e-6 * moved / milliseconds
    if flops:
        found["TFLOP/s"] = 1e-9 * flops / milliseconds
    return found
