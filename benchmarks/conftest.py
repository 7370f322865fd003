"""Prepare a benchmark session, and keep personal data out of its results file."""

import os
from typing import Any

import torch

if not torch.cuda.is_available():
    # Triton's rows then run on the CPU, interpreted, to show that they work; they are not timed.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Keep the processor and the versions; remove the host's name."""
    cpu = machine_info["cpu"]
    machine_info["cpu"] = {key: cpu.get(key) for key in ("brand_raw", "arch", "count", "flags")}
    for key in ("node", "release", "python_build"):
        machine_info.pop(key, None)


def pytest_benchmark_update_commit_info(config: Any, commit_info: dict[str, Any]) -> None:
    """Remove the name of the checkout's folder."""
    commit_info.pop("project", None)
