"""The processes of a job: one, those that a launcher started, or those that the job starts."""

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

from dimr_fast.data import DataUnavailableError
from dimr_fast.device import resolve_device

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process, number `rank` of `count`, and its device."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on each of them."""
        if self.count > 1:
            values = values.clone()
            torch.distributed.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """The tensors [n, ...] of all processes as one [count·n, ...], on each, in their order."""
        if self.count == 1:
            return values
        values = values.to(self.device).contiguous()
        parts = [torch.empty_like(values) for _ in range(self.count)]
        torch.distributed.all_gather(parts, values)
        return torch.cat(parts)

    def from_first(self, value: T) -> T:
        """What the first process passes, on each of them."""
        if self.count > 1:
            values = [value]
            torch.distributed.broadcast_object_list(values, device=self.device)
            (value,) = values
        return value

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()


def join_processes(device: str) -> Processes:
    """Join the other processes of this launch, or be alone; `device` as in `resolve_device`.

    Several processes have a GPU each where there are GPUs and `device` is "auto" or "cuda", and are
    on the CPU otherwise. Raises ValueError for a device that cannot be had and
    DataUnavailableError where accelerate is missing.
    """
    end_with_launcher()
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        own = resolve_device(device)
        if own.type == "cuda" and own.index is not None:
            torch.cuda.set_device(own)  # or pinned memory would take some of the first one
        return Processes(0, 1, own)
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"device: got {device!r}, expected auto, cuda or cpu for many processes")
    # Not told so, accelerate takes each process for the only one where there is no GPU.
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if on_cpu and device == "cuda":
        raise ValueError("device: got 'cuda', expected one that is usable here")
    place = Place.from_environment()
    if not on_cpu and place.local_count > torch.cuda.device_count():
        raise ValueError(
            f"device: got {device!r} with {torch.cuda.device_count()} GPUs for "
            f"{place.local_count} processes, expected one each, or cpu"
        )
    try:
        from accelerate import PartialState
    except ModuleNotFoundError as error:
        raise DataUnavailableError("the accelerate package", extra="train") from error

    # The first process may be busy for long while the others wait: drawing samples, writing.
    state = PartialState(cpu=on_cpu, timeout=timedelta(hours=4))
    if state.num_processes != count:
        raise RuntimeError(f"joined {state.num_processes} processes, not the {count} of the launch")
    return Processes(state.process_index, state.num_processes, state.device)


@cache
def end_with_launcher() -> None:
    """Kill this process once torchrun is gone, which kills its processes unless it was killed.

    Those that it left behind would work on, unseen, and be in the way of a job that is resumed.
    """
    if not torch.distributed.is_torchelastic_launched():
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass(frozen=True)
class Place:
    """A process among all `count` of a job that never talk, and those on its machine (`local`)."""

    rank: int
    count: int
    local_rank: int
    local_count: int

    @classmethod
    def from_environment(cls) -> Self:
        """What torchrun or accelerate has set; alone where nothing is set."""
        defaults = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
        return cls(*(int(os.environ.get(name, default)) for name, default in defaults))

    def part(self, number: int, parts: int) -> "Place":
        """That of the process `number` of `parts` which this one starts."""
        return Place(
            self.rank * parts + number,
            self.count * parts,
            self.local_rank * parts + number,
            self.local_count * parts,
        )

    def device(self, device: torch.device) -> torch.device:
        """This process's own of several GPUs, where only "cuda" is asked for."""
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return device


def start_processes(
    work: Callable[..., object],
    arguments: tuple[Any, ...],
    count: int,
    meanwhile: Callable[[], object],
) -> None:
    """Run `work(number, *arguments)` in `count` new processes, and `meanwhile` now and then here.

    Raises ChildProcessError where one fails; then, and whatever else ends the wait, all end.
    """
    context = spawn(work, arguments, count, join=False)
    try:
        while not context.join(timeout=0.2):
            meanwhile()
        meanwhile()
    except (ProcessRaisedException, ProcessExitedException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ChildProcessError(f"process {error.error_index} stopped: {reason}") from error
    finally:
        for process in context.processes:
            process.terminate()
