"""Compile the tuner's candidates into Triton's cache, ahead of time and on all cores.

A launch whose kernel is in the cache starts at once, so that the GPU need not wait for a compiler.
Compilation needs no GPU: Triton's driver is replaced by one that names the target, tensors are on
the meta device, and a launch only compiles its kernel.
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

from benchmarks.gpu.search_space import CASES, TuningCase, draw_on

Constants = Mapping[str, int]
Verdicts = dict[tuple[str, int, str], str]
"""For kernel, size and candidate: the reason not to time it, or ""."""


def compile_all(
    kernels: Sequence[str] | None, *, gpu: str, capability: tuple[int, int], seconds: float
) -> Verdicts:
    """Compile every candidate of `kernels` (None: of all) for the GPU; return the verdicts.

    A candidate that spills registers or does not compile need not be timed. Candidates that are not
    compiled within `seconds` have no verdict.
    """
    end = time.monotonic() + seconds
    verdicts: Verdicts = {}
    others = set(multiprocessing.active_children())
    # Not by fork, which a process that uses a GPU does not survive.
    pool = futures.ProcessPoolExecutor(
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(gpu, capability),
    )
    try:
        tasks = pool.submit(_list_tasks).result(seconds if math.isfinite(seconds) else None)
        running = [pool.submit(_compile, t) for t in tasks if not kernels or t[0] in kernels]
        left = end - time.monotonic()
        for done in futures.as_completed(running, max(0.0, left) if math.isfinite(left) else None):
            verdicts.update([done.result()])
    except (TimeoutError, BrokenExecutor) as error:
        print(f"{len(verdicts)} candidates compiled ahead, then {type(error).__name__}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        # A worker would finish its task and take another one from the queue, during the timing,
        # and this process could not exit before the workers do.
        workers = set(multiprocessing.active_children()) - others
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(5)
    return verdicts


class _Driver:
    """Replacement for the driver of a GPU."""

    def __init__(self, capability: tuple[int, int]) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


_cases: dict[tuple[str, int], TuningCase] = {}
_launched: list[tuple[Mapping[str, Any], Any]] | None = None
"""Constants and compiled kernels of the launches so far; None: launches do nothing."""


def _start(gpu: str, capability: tuple[int, int]) -> None:
    """Prepare a process of the pool: list all cases, with tensors on the meta device."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from dimr_fast.kernels import configuration

    torch.set_num_threads(1)
    driver.set_active(_Driver(capability))
    configuration.use_files_of(gpu)
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if _launched is not None:
            _launched.append((kwargs, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_only
    draw = draw_on(torch.device("meta"))
    for cases in CASES:
        _cases.update({(case.kernel, case.size): case for case in cases(draw, False)})


def _list_tasks() -> list[tuple[str, int, Constants]]:
    return [(*key, constants) for key, case in _cases.items() for constants in case.candidates]


def _compile(task: tuple[str, int, Constants]) -> tuple[tuple[str, int, str], str]:
    """Compile one candidate; return its key and its verdict."""
    global _launched
    from dimr_fast.kernels import configuration

    kernel, size, constants = task
    verdict = ""
    _launched = []
    try:
        with configuration.trial(kernel, constants, torch.device("meta")):
            _cases[kernel, size].launch()
        for given, compiled in _launched:
            # A launch may start further kernels, which do not take these constants.
            if constants.items() <= given.items() and (spilled := _spilled(compiled)):
                verdict = f"spills {spilled} bytes"
    except Exception as error:
        verdict = f"{type(error).__name__}: {error}".split("\n")[0]
    _launched = None
    return (kernel, size, json.dumps(constants)), verdict


def _spilled(compiled: Any) -> int:
    """Return the bytes of local memory that a thread uses, where registers spill."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
