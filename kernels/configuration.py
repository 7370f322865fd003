"""Launch configurations of the kernels, read from files, by GPU and size."""

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "configurations"
_ANY_SIZE = 2**63


def configuration(kernel: str, size: int, device: torch.device) -> Mapping[str, int]:
    """Return the constants to launch `kernel` with, e.g. `{"ROWS": 4, "num_warps": 4}`.

    `size` is the size that the configuration of that kernel depends on, e.g. the width of a row. A
    file lists configurations by the largest size that each serves. `default.json` serves the sizes
    that `<name of the GPU>.json` does not list; a size larger than all takes the last one there.
    """
    return look_up(kernel, size, gpu_name(device))


def look_up(kernel: str, size: int, gpu: str, folder: Path = FOLDER) -> Mapping[str, int]:
    """Return the constants to launch `kernel` with on the named GPU, from the files in `folder`."""
    for table in (_table(gpu, folder), _table("default", folder)):
        by_size = table.get(kernel, {})
        bucket = min((bucket for bucket in by_size if bucket >= size), default=None)
        if bucket is not None:
            return by_size[bucket]
    return by_size[max(by_size)]


@contextmanager
def trial(kernel: str, constants: Mapping[str, int], device: torch.device) -> Iterator[None]:
    """Launch `kernel` with `constants` for every size inside the `with` block; used for tuning."""
    table = _table(gpu_name(device), FOLDER)
    before = table.get(kernel)
    table[kernel] = {_ANY_SIZE: dict(constants)}
    try:
        yield
    finally:
        if before is None:
            del table[kernel]
        else:
            table[kernel] = before


_chosen_gpu: str | None = None


def use_files_of(gpu: str | None) -> None:
    """From now on take the configurations of the named GPU, whatever the device; None: stop that.

    For compiling ahead of time, where the GPU is not there.
    """
    global _chosen_gpu
    _chosen_gpu = gpu


def gpu_name(device: torch.device) -> str:
    """Return the name of the GPU whose configurations `device` takes, "default" for a CPU."""
    return _chosen_gpu or _name(device)


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "default"


def path(gpu: str, folder: Path = FOLDER) -> Path:
    """Return the path of the configurations of a GPU, or of "default"; it may not exist."""
    return folder / f"{gpu.replace(' ', '_').replace('/', '_')}.json"


@functools.cache
def _table(gpu: str, folder: Path) -> dict[str, dict[int, dict[str, int]]]:
    file = path(gpu, folder)
    table = json.loads(file.read_text()) if file.is_file() else {}
    return {
        kernel: {int(size): constants for size, constants in by_size.items()}
        for kernel, by_size in table.items()
    }
