"""Processes of a job: one process, those that a launcher started, or workers that the job starts.

Training needs communication between its processes (`Communicator`). Sampling and extraction do not:
their workers (`Worker`) only need to know which share of the work is theirs.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, spawn

from dimr_fast.errors import DataUnavailableError
from dimr_fast.utils.device import resolve_device

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(hours=4)
"""Rank 0 may be busy for long while the others wait: it draws samples and writes checkpoints."""


@dataclass(frozen=True)
class Communicator:
    """This process's rank among `world_size` processes, its device, and the collectives.

    With one process every collective returns its argument.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files and prints."""
        return self.rank == 0

    def all_reduce(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes."""
        if self.world_size > 1:
            values = values.clone()
            torch.distributed.all_reduce(values)
        return values

    def all_gather(self, values: Tensor) -> Tensor:
        """Return the tensors [n, ...] of all ranks, in rank order, as one [world_size·n, ...]."""
        if self.world_size == 1:
            return values
        values = values.to(self.device).contiguous()
        gathered = [torch.empty_like(values) for _ in range(self.world_size)]
        torch.distributed.all_gather(gathered, values)
        return torch.cat(gathered)

    def broadcast(self, value: T) -> T:
        """Return rank 0's value; it is pickled."""
        if self.world_size > 1:
            values = [value]
            torch.distributed.broadcast_object_list(values, device=self.device)
            (value,) = values
        return value

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world_size > 1:
            torch.distributed.barrier()


def init_communicator(device: str) -> Communicator:
    """Connect to the other processes of this launch, if any; `device` as in `resolve_device`.

    With several processes each has its own GPU where there are GPUs and `device` is "auto" or
    "cuda"; otherwise all are on the CPU. Raises ValueError for an unusable device and
    DataUnavailableError where accelerate is missing.
    """
    exit_with_launcher()
    worker = Worker.from_environment()
    if worker.world_size == 1:
        own = resolve_device(device)
        if own.type == "cuda" and own.index is not None:
            torch.cuda.set_device(own)  # or pinned memory would occupy some of GPU 0
        return Communicator(0, 1, own)
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"device: got {device!r}, expected auto, cuda or cpu for many processes")
    # Without a GPU accelerate needs cpu=True: it would treat each process as a run of its own.
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if on_cpu and device == "cuda":
        raise ValueError("device: got 'cuda', expected one that is usable here")
    if not on_cpu and worker.local_world_size > torch.cuda.device_count():
        raise ValueError(
            f"device: got {device!r} with {torch.cuda.device_count()} GPUs for "
            f"{worker.local_world_size} processes, expected one each, or cpu"
        )
    try:
        from accelerate import PartialState
    except ModuleNotFoundError as error:
        raise DataUnavailableError("the accelerate package", extra="train") from error

    state = PartialState(cpu=on_cpu, timeout=COLLECTIVE_TIMEOUT)
    if state.num_processes != worker.world_size:
        raise RuntimeError(
            f"connected to {state.num_processes} processes, not the {worker.world_size} launched"
        )
    return Communicator(state.process_index, state.num_processes, state.device)


@cache
def exit_with_launcher() -> None:
    """Make this process exit once torchrun, its parent, is gone.

    torchrun stops its processes unless torchrun itself is killed. The processes would then continue
    in the background and write to the same files as the resumed job.
    """
    if torch.distributed.is_torchelastic_launched():
        _exit_with(os.getppid())


def _exit_with(parent: int) -> None:
    """Start a thread that ends this process once its parent is another process than `parent`."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass(frozen=True)
class Worker:
    """Rank of a worker in a job without communication (embarrassingly parallel).

    `local_rank` and `local_world_size` count the workers on this machine.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> Self:
        """Read the ranks that torchrun or `accelerate launch` has set; without them, rank 0 of
        1."""
        defaults = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
        return cls(*(int(os.environ.get(name, default)) for name, default in defaults))

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files and prints."""
        return self.rank == 0

    def child(self, index: int, count: int) -> "Worker":
        """Return the rank of child process `index` of the `count` that this process starts."""
        return Worker(
            self.rank * count + index,
            self.world_size * count,
            self.local_rank * count + index,
            self.local_world_size * count,
        )

    def device(self, device: torch.device) -> torch.device:
        """Return `device`, or this worker's own GPU where it is "cuda" without an index."""
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return device


def run_processes(
    work: Callable[..., object],
    arguments: tuple[Any, ...],
    count: int,
    poll: Callable[[], object],
) -> None:
    """Run `work(index, *arguments)` in `count` new processes, and call `poll` while they run.

    Raises ChildProcessError if one fails. When this function returns or raises, all child processes
    have been told to stop. They also exit if this process is killed.
    """
    context = spawn(_work, (os.getpid(), work, arguments), count, join=False)
    try:
        while not context.join(timeout=0.2):
            poll()
        poll()
    except (ProcessRaisedException, ProcessExitedException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ChildProcessError(f"process {error.error_index} stopped: {reason}") from error
    finally:
        for process in context.processes:
            process.terminate()


def _work(index: int, parent: int, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    _exit_with(parent)
    work(index, *arguments)
