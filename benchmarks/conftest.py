"""What pytest-benchmark writes about the machine: its processor and versions, not whose it is."""

import os
from typing import Any

import torch

if not torch.cuda.is_available():
    # So that Triton's rows run on a CPU too; their times are not kept.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    cpu = machine_info["cpu"]
    machine_info["cpu"] = {key: cpu.get(key) for key in ("brand_raw", "arch", "count", "flags")}
    for key in ("node", "release", "python_build"):
        machine_info.pop(key, None)


def pytest_benchmark_update_commit_info(config: Any, commit_info: dict[str, Any]) -> None:
    commit_info.pop("project", None)
