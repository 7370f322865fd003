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
    for table in (_table(gpu_name(device)), _table("default")):
        by_size = table.get(kernel, {})
        bucket = min((bucket for bucket in by_size if bucket >= size), default=None)
        if bucket is not None:
            return by_size[bucket]
    return by_size[max(by_size)]


@contextmanager
def trial(kernel: str, constants: Mapping[str, int], device: torch.device) -> Iterator[None]:
    """Launch `kernel` with `constants` for every size inside the `with` block; used for tuning."""
    table = _table(gpu_name(device))
    before = table.get(kernel)
    table[kernel] = {_ANY_SIZE: dict(constants)}
    try:
        yield
    finally:
        if before is None:
            del table[kernel]
        else:
            table[kernel] = before


@functools.cache
def gpu_name(device: torch.device) -> str:
    """Return the name of the GPU, "default" for other devices."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "default"


def path(gpu: str) -> Path:
    """Return the path of the configurations of a GPU, or of "default"; it may not exist."""
    return FOLDER / f"{gpu.replace(' ', '_').replace('/', '_')}.json"


@functools.cache
def _table(gpu: str) -> dict[str, dict[int, dict[str, int]]]:
    file = path(gpu)
    table = json.loads(file.read_text()) if file.is_file() else {}
    return {
        kernel: {int(size): constants for size, constants in by_size.items()}
        for kernel, by_size in table.items()
    }
