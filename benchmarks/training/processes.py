"""Measure training on 1, 2 and 4 processes of this machine.

    python -m benchmarks.training.processes

trains the demo's model with one batch shared by all processes, with DDP and with FSDP2 over gloo,
and writes `results/processes.json`: images per second of all processes together, and the largest
resident memory of a process. Processes share the cores of this machine, whose number is in the
file, so the rates show what communication and divided work cost, not what more machines gain.
"""

import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.training.communication import SHARDINGS, gradient_step
from benchmarks.utils import machine
from benchmarks.utils.files import RESULTS
from dimr_fast.config import preset
from dimr_fast.optim import EMA, adamw
from dimr_fast.utils.device import keep_freed_memory
from dimr_fast.utils.distributed import Communicator
from dimr_fast.utils.files import write_json

RESULT = RESULTS / "processes.json"
PRESET, BATCH = "demo", 32
COUNTS = (1, 2, 4)
WARM_UP, STEPS = 2, 9


def measure(
    preset_name: str, batch: int, steps: int, sharding: str, processes: int
) -> dict[str, Any]:
    """Return the row of a training by so many new processes."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result")
        arguments = (processes, folder, preset_name, batch, steps, sharding, result)
        torch.multiprocessing.spawn(_process, arguments, nprocs=processes)
        seconds, resident = torch.load(result, weights_only=True)
    return {
        "preset": preset_name,
        "batch": batch,
        "processes": processes,
        "sharding": sharding,
        "images_per_second": batch / seconds,
        "resident_bytes_of_a_process": resident,
    }


def _process(
    rank: int,
    processes: int,
    folder: str,
    preset_name: str,
    batch: int,
    steps: int,
    sharding: str,
    result: Path,
) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    keep_freed_memory()
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    communicator = Communicator(rank, processes, torch.device("cpu"))
    model, gradients = gradient_step(
        preset(preset_name), sharding, communicator, batch // processes
    )
    optimizer, ema = adamw(model, 1e-4), EMA(model)
    seconds = []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        gradients()
        optimizer.step()
        ema.update(0.9999)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    largest = torch.tensor(peak)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    if rank == 0:
        torch.save((statistics.median(seconds[WARM_UP:]), int(largest)), result)
    dist.destroy_process_group()


def report() -> dict[str, Any]:
    """Return a row for each number of processes and each sharding."""
    rows = [
        measure(PRESET, BATCH, STEPS, sharding, processes)
        for processes in COUNTS
        for sharding in SHARDINGS
        if processes > 1 or sharding == "none"
    ]
    cores = len(os.sched_getaffinity(0))
    return machine.description() | {"backend": "gloo", "cores": cores, "rows": rows}


if __name__ == "__main__":
    write_json(RESULT, report())
