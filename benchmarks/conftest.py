"""What pytest-benchmark writes about the machine: its processor and versions, not whose it is."""

from typing import Any


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    cpu = machine_info["cpu"]
    machine_info["cpu"] = {key: cpu.get(key) for key in ("brand_raw", "arch", "count", "flags")}
    for key in ("node", "release", "python_build"):
        machine_info.pop(key, None)


def pytest_benchmark_update_commit_info(config: Any, commit_info: dict[str, Any]) -> None:
    commit_info.pop("project", None)
