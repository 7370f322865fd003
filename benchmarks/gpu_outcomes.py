"""Pytest plugin of the GPU report: writes each outcome to disk at once.

A run that is killed, or that does not end after an interruption, then keeps all that had ended.
The folder that `GPU_OUTCOMES` names receives

    tests.jsonl        a line per test: {"test": …, "outcome": …, "reason": …}
    benchmarks.json    pytest-benchmark's report of the rows so far

`gpu_part.Part.pytest` loads it with `-p gpu_outcomes`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from gpu_render import write_whole

TESTS, BENCHMARKS = "tests.jsonl", "benchmarks.json"


def pytest_configure(config: pytest.Config) -> None:
    # The workers of xdist send their reports to the controller, which writes them.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(config, Path(os.environ["GPU_OUTCOMES"])))


class _Recorder:
    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._machine: Mapping[str, Any] | None = None
        self._rows = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # Targets are judged in bf16: what is cut off should be fp32.
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
        # As pytest-benchmark itself does, for parameters that are objects.
        text = json.dumps(report, default=lambda value: f"UNSERIALIZABLE[{value!r}]")
        write_whole(self._folder / BENCHMARKS, text + "\n")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The first line of why a test failed or was skipped; empty where it passed."""
    found = report.longrepr
    if isinstance(found, tuple):  # of a skip: file, line, reason
        text = found[2].removeprefix("Skipped: ")
    elif (crash := getattr(found, "reprcrash", None)) is not None:
        text = crash.message
    else:
        text = str(found or "").strip().rpartition("\n")[2]
    return text.split("\n")[0][:300]
