"""Pytest plugin of the GPU report: write each outcome to disk at once.

A session that is killed, or that does not react to an interruption, then keeps the outcomes of all
tests that had ended. The folder named by the environment variable GPU_OUTCOMES receives

    tests.jsonl        one line per test: {"test": …, "outcome": …, "reason": …}
    benchmarks.json    pytest-benchmark's report of the rows so far

`SectionRun.run_pytest` loads the plugin with `-p`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.utils.files import write_atomically

TESTS, BENCHMARKS = "tests.jsonl", "benchmarks.json"


def pytest_configure(config: pytest.Config) -> None:
    """Register the recorder, except in workers of pytest-xdist, which report to the controller."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(config, Path(os.environ["GPU_OUTCOMES"])))


class _Recorder:
    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._machine: Mapping[str, Any] | None = None
        self._rows = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # Targets are judged in bf16, so fp32 comes last.
        items.sort(key=lambda item: "float32" in item.name)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report.nodeid, "error", _reason(report))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        outcome = "error" if report.failed and report.when != "call" else report.outcome
        self._write(report.nodeid, outcome, _reason(report))
        self._write_benchmarks()

    def _write(self, test: str, outcome: str, reason: str) -> None:
        with (self._folder / TESTS).open("a") as file:
            file.write(json.dumps({"test": test, "outcome": outcome, "reason": reason}) + "\n")

    def _write_benchmarks(self) -> None:
        session = getattr(self._config, "_benchmarksession", None)
        done = [row for row in session.benchmarks if row and not row.has_error] if session else []
        if len(done) == self._rows:
            return
        self._rows = len(done)
        hook = self._config.hook
        if self._machine is None:
            commit = hook.pytest_benchmark_generate_commit_info(config=self._config)
            hook.pytest_benchmark_update_commit_info(config=self._config, commit_info=commit)
            self._machine = {"machine_info": session.get_machine_info(), "commit_info": commit}
        report = hook.pytest_benchmark_generate_json(
            config=self._config, benchmarks=done, include_data=True, **self._machine
        )
        # Parameters may be objects; pytest-benchmark writes the same placeholder for them.
        text = json.dumps(report, default=lambda value: f"UNSERIALIZABLE[{value!r}]")
        write_atomically(self._folder / BENCHMARKS, text + "\n")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return the first line of why a test failed or was skipped; "" if it passed."""
    found = report.longrepr
    if isinstance(found, tuple):  # of a skipped test: file, line, reason
        text = found[2].removeprefix("Skipped: ")
    elif (crash := getattr(found, "reprcrash", None)) is not None:
        text = crash.message
    else:
        text = str(found or "").strip().rpartition("\n")[2]
    return text.split("\n")[0][:300]
