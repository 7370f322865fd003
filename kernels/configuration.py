"""Launch configurations of the kernels, from files, by GPU and size."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "configurations"


def configuration(kernel: str, size: int, device: torch.device) -> Mapping[str, int]:
    """The constants with which to launch `kernel`, e.g. `{"ROWS": 4, "num_warps": 4}`.

    `size` is what decides in that kernel (say, the width of a row). A file lists configurations by
    the largest size each is for; a larger size than any takes the last. `default.json` serves the
    GPUs, and the kernels, that `<name of the GPU>.json` does not list.
    """
    gpu = gpu_name(device)
    by_size = _table(gpu).get(kernel) or _table("default")[kernel]
    largest = max(by_size)
    return by_size[min((bucket for bucket in by_size if bucket >= size), default=largest)]


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
