"""Where a job runs, and in which precision."""

import ctypes
import sys
import time
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F

Precision = Literal["auto", "fp32", "bf16", "fp16"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: str) -> torch.device:
    """ "auto" is a CUDA device where there is one, else the CPU; ValueError for an unusable one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: got {device!r}, which is not usable here ({error})") from error
    return found


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the matrix products; "auto" is bf16 where the device is faster with it."""
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if _bf16_is_faster() else torch.float32


def precision_name(dtype: torch.dtype) -> Precision:
    """The setting that stands for a dtype."""
    names: dict[torch.dtype, Precision] = {
        torch.float32: "fp32",
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
    }
    return names[dtype]


def keep_freed_memory() -> None:
    """Let the C library keep what it is given back for the next request, in this process.

    It returns large blocks to the system, which hands out every page of the next one anew: several
    thousand page faults a training step. Only glibc is told; another is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
        mallopt(trim_threshold, 2**31 - 1)
        # Before glibc 2.35 no more than 32 MiB is taken.
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)


def device_name(device: torch.device) -> str:
    """The device in words, for a report."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}, {torch.backends.cpu.get_cpu_capability()}"


@cache
def _bf16_is_faster() -> bool:
    """Time one linear layer in each dtype: a CPU may compute bf16 in hardware or emulate it."""
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
    # A margin, because autocast adds casts.
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]
