"""Device and precision of a job."""

import ctypes
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F

Precision = Literal["auto", "fp32", "bf16", "fp16"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: str) -> torch.device:
    """Return the device; "auto" is CUDA where available, else the CPU.

    Raises ValueError for an unusable device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: got {device!r}, which is not usable here ({error})") from error
    return found


@cache
def bf16_is_faster_on_cpu() -> bool:
    """Time one linear layer in each dtype: a CPU may have bf16 instructions or emulate them."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2048, 256).to(dtype)
        weight = torch.randn(512, 256).to(dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            F.linear(x, weight)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    # The factor allows for the casts that autocast adds.
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]


def resolve_precision(
    precision: Precision,
    device: torch.device,
    *,
    measure_cpu: Callable[[], bool] = bf16_is_faster_on_cpu,
) -> torch.dtype:
    """Return the dtype of matrix products; "auto" is bf16 where it is faster on the device.

    On a CPU `measure_cpu` returns whether it is.
    """
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if measure_cpu() else torch.float32


def precision_name(dtype: torch.dtype) -> Precision:
    """Return the setting that means `dtype`."""
    names: dict[torch.dtype, Precision] = {
        torch.float32: "fp32",
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
    }
    return names[dtype]


def keep_freed_memory() -> None:
    """Make the C library reuse freed memory instead of returning it to the system.

    By default glibc returns large blocks, and the next allocation faults in every page anew:
    several thousand page faults per training step. Other C libraries are left unchanged.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
        mallopt(trim_threshold, 2**31 - 1)
        # glibc before 2.35 accepts at most 32 MiB.
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)


def device_name(device: torch.device) -> str:
    """Describe the device for a report."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}, {torch.backends.cpu.get_cpu_capability()}"
