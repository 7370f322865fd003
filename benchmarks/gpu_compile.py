"""Compile the tuner's candidates ahead of time, on all cores, into Triton's cache.

A launch whose kernel is in the cache starts at once, so the GPU does not wait for a compiler. The
compilation needs no GPU: Triton's driver is replaced by one that names the target, tensors are on
the meta device, and a launch compiles what it would have run.
"""

import json
import math
import multiprocessing
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import torch

Constants = Mapping[str, int]
Verdicts = dict[tuple[str, int, str], str]
"""Why a candidate, of a kernel at a size, is not worth timing; "" where it is."""


def compile_all(
    kernels: Sequence[str] | None, *, gpu: str, capability: tuple[int, int], seconds: float
) -> Verdicts:
    """Compile every candidate of these kernels, None for all, for a GPU of that name.

    What took longer than `seconds` in all is given up and has no verdict. A candidate whose
    registers spill to memory, or that does not compile, is not worth timing.
    """
    end = time.monotonic() + seconds
    verdicts: Verdicts = {}
    others = set(multiprocessing.active_children())
    # Not by fork: this process may use the GPU already.
    pool = futures.ProcessPoolExecutor(
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(gpu, capability),
    )
    try:
        tasks = pool.submit(_tasks).result(seconds if math.isfinite(seconds) else None)
        running = [pool.submit(_compile, t) for t in tasks if not kernels or t[0] in kernels]
        left = end - time.monotonic()
        for done in futures.as_completed(running, max(0.0, left) if math.isfinite(left) else None):
            verdicts.update([done.result()])
    except (TimeoutError, BrokenExecutor) as error:
        print(f"{len(verdicts)} candidates compiled ahead, then {type(error).__name__}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        # Each worker would end its task and take another from the queue, beside the timing, and
        # this process could not end before them.
        workers = set(multiprocessing.active_children()) - others
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(1)
    return verdicts


class _Driver:
    """Stands for the driver of a GPU."""

    def __init__(self, capability: tuple[int, int]) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


_cases: dict[tuple[str, int], Any] = {}
_launched: list[tuple[Mapping[str, Any], Any]] | None = None
"""Constants and compiled kernels of the launches since it was emptied; None: launch nothing."""


def _start(gpu: str, capability: tuple[int, int]) -> None:
    """Prepare a process of the pool: all cases, on the meta device."""
    import tune
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from dimr_fast.kernels import configuration

    torch.set_num_threads(1)
    driver.set_active(_Driver(capability))
    configuration.gpu_name = lambda device: gpu  # type: ignore[assignment]
    tune.DEVICE = torch.device("meta")
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if _launched is not None:
            _launched.append((kwargs, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_only
    for cases in tune.CASES:
        _cases.update({(case.kernel, case.size): case for case in cases(False)})


def _tasks() -> list[tuple[str, int, Constants]]:
    return [(*key, constants) for key, case in _cases.items() for constants in case.candidates]


def _compile(task: tuple[str, int, Constants]) -> tuple[tuple[str, int, str], str]:
    global _launched
    from dimr_fast.kernels import configuration

    kernel, size, constants = task
    verdict = ""
    _launched = []
    try:
        with configuration.trial(kernel, constants, torch.device("meta")):
            _cases[kernel, size].launch()
        for given, compiled in _launched:
            # A launch may start other kernels too, which are not under trial.
            if constants.items() <= given.items() and (spilled := _spilled(compiled)):
                verdict = f"spills {spilled} bytes"
    except Exception as error:
        verdict = f"{type(error).__name__}: {error}".split("\n")[0]
    _launched = None
    return (kernel, size, json.dumps(constants)), verdict


def _spilled(compiled: Any) -> int:
    """Bytes of local memory that a thread of a kernel uses."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
