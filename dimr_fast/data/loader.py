"""Which examples each step of a training reads, on any number of processes, from any step on."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dimr_fast.data import Examples
from dimr_fast.seeds import derived_seed


@dataclass(frozen=True)
class Batch:
    """One process's part of the batch of `step`, on the CPU: what `Examples.read` gives."""

    step: int
    indices: Tensor
    raw: Tensor
    labels: Tensor

    def pin_memory(self) -> "Batch":
        """In memory that a GPU copies from while it computes."""
        return Batch(self.step, self.indices, self.raw.pin_memory(), self.labels.pin_memory())


class Loader:
    """Endless batches of `examples`, shuffled anew each epoch.

    Every example comes once an epoch; where an epoch ends within a batch the next one begins in it.
    A batch of `batch_size` is split evenly, in order, among `processes`, of which this is number
    `rank`, so together they read what one alone would. Half of the examples are mirrored, if
    `mirror`. All of it follows from the seed and the step alone: the state is the next step.

    `workers` processes read ahead; `pin_memory` as torch's DataLoader.
    Raises ValueError where the batch cannot be split, or there are no examples.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
        mirror: bool = True,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1 or batch_size % processes:
            raise ValueError(
                f"batch_size: got {batch_size}, expected a multiple of the {processes} processes"
            )
        if not 0 <= rank < processes:
            raise ValueError(f"rank: got {rank}, expected 0..{processes - 1}")
        if len(examples.labels) == 0:
            raise ValueError("examples: got none, expected at least one")
        self._steps = _Steps(examples, batch_size, seed, rank, processes, mirror)
        self._workers, self._pin_memory = workers, pin_memory
        self.step = 0

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            self._steps,
            batch_size=None,
            sampler=count(self.step),
            num_workers=self._workers,
            pin_memory=self._pin_memory,
            worker_init_fn=_leave_signals_to_the_job,
        )
        for batch in loader:
            if isinstance(batch, OSError):
                raise batch
            self.step = batch.step + 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where to go on; small enough for any checkpoint."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken, with the next iterator."""
        self.step = state["step"]


@dataclass(frozen=True)
class _Steps(Dataset[Batch | OSError]):
    """The batch of each step, for torch's DataLoader."""

    examples: Examples
    batch_size: int
    seed: int
    rank: int
    processes: int
    mirror: bool

    def __getitem__(self, step: int) -> Batch | OSError:
        share = self.batch_size // self.processes
        part = slice(self.rank * share, (self.rank + 1) * share)
        indices = batch_indices(len(self.examples.labels), self.batch_size, self.seed, step)[part]
        generator = torch.Generator().manual_seed(derived_seed(self.seed, 2, step))
        mirrored = torch.rand(self.batch_size, generator=generator)[part] < 0.5 * self.mirror
        try:
            raw = self.examples.read(indices, mirrored)
        except OSError as error:
            # Raised in a worker it would arrive as pages of text.
            return error
        return Batch(step, indices, raw, self.examples.labels[indices])


def _leave_signals_to_the_job(worker: int) -> None:
    """Launchers and terminals signal workers too, whose end would end the job before it can save.

    They end when the job tells them to, or is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The indices, int64 [batch_size], that step reads of `count` examples on all processes."""
    places = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = places // count
    parts = [
        _permutation(count, seed, epoch)[places[epochs == epoch] - epoch * count]
        for epoch in epochs.unique().tolist()
    ]
    return torch.cat(parts)


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(derived_seed(seed, 1, epoch))
    return torch.randperm(count, generator=generator)
