"""The processes of a job: one, or those that torchrun or `accelerate launch` started."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from dimr_fast.data import DataUnavailableError
from dimr_fast.device import resolve_device


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
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(0, 1, resolve_device(device))
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"device: got {device!r}, expected auto, cuda or cpu for many processes")
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if on_cpu and device == "cuda":
        raise ValueError("device: got 'cuda', expected one that is usable here")
    try:
        from accelerate import PartialState
    except ModuleNotFoundError as error:
        raise DataUnavailableError("the accelerate package", extra="train") from error

    # Unless it is told so, accelerate leaves processes without a GPU to themselves.
    # The first process may be busy for long while the others wait: drawing samples, writing.
    state = PartialState(cpu=on_cpu, timeout=timedelta(hours=4))
    return Processes(state.process_index, state.num_processes, state.device)
