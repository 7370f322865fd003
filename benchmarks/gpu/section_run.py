"""Run one section of the GPU report: its time limit, its commands and its findings."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.utils.files import ROOT, write_atomically
from benchmarks.utils.names import OUT_OF_MEMORY
from benchmarks.utils.spread import Spread

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
MAX_FAILED_TESTS = 30
"""Failed tests that the report shows."""
INTERRUPT_SECONDS = 20.0
"""Time for an interrupted command to end: pytest-xdist takes 12 s."""

Rows = list[dict[str, Any]]


class PytestResult(NamedTuple):
    """Exit code 0 or not, outcomes of the tests, and the report of pytest-benchmark."""

    passed: bool
    outcomes: Rows
    benchmarks: dict[str, Any] | None


class SectionRun:
    """A running section: facts, tables, notes and warnings, written to disk after each addition.

    `rows` are those chosen on the command line, None for all.
    """

    def __init__(
        self, name: str, out: Path, seconds: float, dry_run: bool, rows: str | None = None
    ) -> None:
        self.name, self.out, self.dry_run = name, out, dry_run
        self.chosen = rows
        # An interrupted command needs time to end, and this process to write the findings.
        self.interrupt_seconds = min(INTERRUPT_SECONDS, seconds / 5)
        self.end = time.monotonic() + seconds - self.interrupt_seconds - min(5.0, seconds / 20)
        self.failed = False
        self._interrupted = False
        self._findings: dict[str, Any] = {}

    def seconds_left(self) -> float:
        """Return the seconds until this section should end by itself."""
        return self.end - time.monotonic()

    def add_fact(self, name: str, value: Any) -> None:
        """Add a line to the section's table of facts."""
        self._findings.setdefault("facts", {})[name] = value
        self._save()

    def add_rows(self, table: str, rows: Rows) -> None:
        """Append rows to a table of the section."""
        self._findings.setdefault("tables", {}).setdefault(table, []).extend(rows)
        self._save()

    def note(self, text: str) -> None:
        """Add a remark to the section."""
        self._findings.setdefault("notes", []).append(text)
        self._save()

    def warn(self, text: str) -> None:
        """Add a remark to the top of the report."""
        self._findings.setdefault("warnings", []).append(text)
        self._save()

    def fail(self, reason: str) -> None:
        """Mark the section as failed."""
        self.failed = True
        self.note(reason)

    def cut_short(self, reason: str) -> None:
        """Mark the section as incomplete for lack of time."""
        self._findings["cut_short"] = True
        self.note(reason)

    def _save(self) -> None:
        write_atomically(
            self.out / f"{self.name}.json", json.dumps(self._findings, indent=1) + "\n"
        )

    def run_command(
        self,
        title: str,
        command: Sequence[str | Path],
        *,
        seconds: float = float("inf"),
        environment: Mapping[str, str] | None = None,
        folder: Path = ROOT,
        optional: bool = False,
    ) -> bool:
        """Run a command in `folder`; return True if it ended with exit code 0.

        After `seconds`, or when the section's time is over, the command is interrupted like by
        Ctrl-C: pytest and the tuner then keep what they have. Another exit code than 0 fails the
        section, unless the command is `optional`.
        """
        limit = min(seconds, self.seconds_left())
        self._interrupted = limit < 0.5
        if self._interrupted:
            self.cut_short(f"{title}: not started, no time was left")
            return False
        print(f"+ {shlex.join(map(str, command))}", flush=True)
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # Background jobs of a shell ignore SIGINT, and the command would inherit that.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(command, cwd=folder, env={**os.environ, **(environment or {})})
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            self._interrupted = True
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(self.interrupt_seconds)
            process.kill()
            # A process that waits for a driver may survive even this; its files are still read.
            with suppress(subprocess.TimeoutExpired):
                process.wait(2)
            (self.note if optional else self.cut_short)(f"{title}: interrupted after {limit:.0f} s")
            return False
        if code != 0:
            (self.note if optional else self.fail)(f"{title}: exit code {code}")
        return code == 0

    def run_pytest(
        self,
        title: str,
        arguments: Sequence[str | Path],
        *,
        under: Sequence[str | Path] = (),
        seconds: float = float("inf"),
        environment: Mapping[str, str] | None = None,
    ) -> PytestResult:
        """Run pytest, and add counts and failed tests to the section.

        `under` is a command that runs pytest as its argument. Tests that ended before an
        interruption keep their outcomes. The section fails if no test passed, unless the run was
        interrupted before.
        """
        with tempfile.TemporaryDirectory() as folder:
            # `python -m pytest` finds the plugin in ROOT, the working folder.
            passed = self.run_command(
                title,
                [*under, *PYTEST, "-p", "benchmarks.gpu.pytest_plugin", *arguments],
                seconds=seconds,
                environment={**(environment or {}), "GPU_OUTCOMES": folder},
            )
            tests, benchmarks = Path(folder, "tests.jsonl"), Path(folder, "benchmarks.json")
            lines = tests.read_text().splitlines() if tests.is_file() else []
            outcomes = [json.loads(line) for line in lines]
            report = json.loads(benchmarks.read_text()) if benchmarks.is_file() else None
        self._add_outcomes(title, outcomes)
        return PytestResult(passed, outcomes, report)

    def _add_outcomes(self, title: str, outcomes: Rows) -> None:
        counts = dict.fromkeys(("passed", "failed", "error", "skipped"), 0)
        for entry in outcomes:
            counts[entry["outcome"]] += 1
        self.add_rows("tests", [{"tests": title} | counts])
        wrong = [entry for entry in outcomes if entry["outcome"] in ("failed", "error")]
        if wrong:
            shown = wrong[:MAX_FAILED_TESTS]
            self.add_rows(
                "tests that failed",
                [{"test": entry["test"], "message": entry["reason"]} for entry in shown],
            )
        passed = any(
            entry["outcome"] == "passed" or entry["reason"].startswith(OUT_OF_MEMORY)
            for entry in outcomes
        )
        # Nothing is known about tests that were not reached.
        if not passed and not self._interrupted:
            self.fail(f"{title}: no test passed")


def times(milliseconds: Sequence[float]) -> dict[str, float]:
    """Return the columns of a row that state its times."""
    spread = Spread.of(milliseconds)
    return {"median ms": spread.median, "p20 ms": spread.p20, "p80 ms": spread.p80}


def rates(milliseconds: float, moved: int, flops: int) -> dict[str, float]:
    """Return GB/s of `moved` bytes and TFLOP/s, without those whose count is 0."""
    found = {}
    if moved:
        found["GB/s"] = 1e-6 * moved / milliseconds
    if flops:
        found["TFLOP/s"] = 1e-9 * flops / milliseconds
    return found
