"""Launch configurations of the kernels, from files, by GPU and size."""

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "configurations"
_ANY_SIZE = 2**63


def configuration(kernel: str, size: int, device: torch.device) -> Mapping[str, int]:
    """The constants with which to launch `kernel`, e.g. `{"ROWS": 4, "num_warps": 4}`.

    `size` is what decides in that kernel (say, the width of a row). A file lists configurations by
    the largest size each is for. What `<name of the GPU>.json` does not list, `default.json` does;
    a size beyond all listed there takes the last.
    """
    for table in (_table(gpu_name(device)), _table("default")):
        by_size = table.get(kernel, {})
        bucket = min((bucket for bucket in by_size if bucket >= size), default=None)
        if bucket is not None:
            return by_size[bucket]
    return by_size[max(by_size)]


@contextmanager
def trial(kernel: str, constants: Mapping[str, int], device: torch.device) -> Iterator[None]:
    """Launch `kernel` with `constants`, whatever the size: how a tuner tries them."""
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
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "default"


def path(gpu: str) -> Path:
    """The file of a GPU's configurations, there or not; of "default" for all others."""
    return FOLDER / f"{gpu.replace(' ', '_').replace('/', '_')}.json"


@functools.cache
def _table(gpu: str) -> dict[str, dict[int, dict[str, int]]]:
    file = path(gpu)
    table = json.loads(file.read_text()) if file.is_file() else {}
    return {
        kernel: {int(size): constants for size, constants in by_size.items()}
        for kernel, by_size in table.items()
    }
