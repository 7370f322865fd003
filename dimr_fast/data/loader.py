"""Batches of a training run, for any number of processes, from any step."""

import errno
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dimr_fast.data.examples import Examples
from dimr_fast.utils.seeds import derived_seed


@dataclass(frozen=True)
class Batch:
    """This rank's share of the batch of `step`, on the CPU; `raw` comes from `Examples.read`."""

    step: int
    indices: Tensor
    raw: Tensor
    labels: Tensor

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory, from which a GPU copies asynchronously."""
        return Batch(self.step, self.indices, self.raw.pin_memory(), self.labels.pin_memory())


class Loader:
    """Iterate over batches of `examples` without end, shuffled anew in each epoch.

    Every example occurs once per epoch; a batch may span two epochs. A batch of `batch_size` is
    split evenly, in order, over `world_size` ranks, so together they read the same batch as one
    process. With `mirror` each example is mirrored with probability 0.5. Everything is derived from
    the seed and the step, so the loader's state is the next step.

    `workers` processes read ahead; `pin_memory` as in torch's DataLoader. Raises ValueError where
    the batch cannot be split, or there are no examples. Iterating raises OSError for an example
    that cannot be read, and where workers are killed or lack shared memory.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        mirror: bool = True,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size: got {batch_size}, expected a multiple of the {world_size} processes"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: got {rank}, expected 0..{world_size - 1}")
        if len(examples.labels) == 0:
            raise ValueError("examples: got none, expected at least one")
        self._batch_of_step = _BatchOfStep(examples, batch_size, seed, rank, world_size, mirror)
        self._workers, self._pin_memory = workers, pin_memory
        self.step = 0

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            self._batch_of_step,
            batch_size=None,
            sampler=count(self.step),
            num_workers=self._workers,
            pin_memory=self._pin_memory,
            worker_init_fn=_ignore_signals,
        )
        try:
            for batch in loader:
                if isinstance(batch, _NoSharedMemory):
                    raise self._no_shared_memory(batch)
                if isinstance(batch, OSError):
                    raise batch
                self.step = batch.step + 1
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            # A bus error is an access to shared memory that the system could not provide.
            if "Bus error" in str(error):
                raise self._no_shared_memory(error) from error
            raise OSError(
                f"workers: got {self._workers}, one of which was killed, perhaps for lack of "
                f"memory ({error}); expected fewer, or 0"
            ) from error
        except OSError as error:
            # The queues of the workers need shared memory too.
            if error.errno != errno.ENOSPC:
                raise
            raise self._no_shared_memory(error) from error

    def _no_shared_memory(self, reason: Exception) -> OSError:
        return OSError(
            f"workers: got {self._workers}, whose batches need more shared memory (/dev/shm) than "
            f"there is ({reason}), expected fewer or 0, or more shared memory, such as by "
            "`docker run --shm-size=2g`"
        )

    def state_dict(self) -> dict[str, int]:
        """Return the position, for a checkpoint."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the position; takes effect at the next `__iter__`."""
        self.step = state["step"]


class _NoSharedMemory(OSError):
    """Report that a worker has no room in shared memory for its batch."""


@dataclass(frozen=True)
class _BatchOfStep(Dataset[Batch | OSError]):
    """Map a step to its batch, for torch's DataLoader."""

    examples: Examples
    batch_size: int
    seed: int
    rank: int
    world_size: int
    mirror: bool

    def __getitem__(self, step: int) -> Batch | OSError:
        share = self.batch_size // self.world_size
        own = slice(self.rank * share, (self.rank + 1) * share)
        indices = batch_indices(len(self.examples.labels), self.batch_size, self.seed, step)[own]
        generator = torch.Generator().manual_seed(derived_seed(self.seed, 2, step))
        drawn = torch.rand(self.batch_size, generator=generator, dtype=torch.float32)
        mirrored = drawn[own] < 0.5 * self.mirror
        try:
            raw = self.examples.read(indices, mirrored)
        except OSError as error:
            # Raised in a worker process it would arrive as a long traceback text.
            return error
        batch = Batch(step, indices, raw, self.examples.labels[indices])
        if get_worker_info() is not None:
            # torch would do it in a thread of the worker, whose errors it prints and forgets: the
            # training process would wait for the batch for ever.
            try:
                for tensor in (batch.indices, batch.raw, batch.labels):
                    tensor.share_memory_()
            except RuntimeError as error:
                return _NoSharedMemory(error)
        return batch


def _ignore_signals(worker: int) -> None:
    """Ignore SIGINT, SIGTERM and SIGHUP, which launchers and terminals send to workers too.

    A worker that ended on its own would end the job before it can save. Workers exit when the job
    stops them or has died.
    """
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(number, signal.SIG_IGN)


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Return the indices (0..count − 1) of the batch of `step`, int64 [batch_size], for all
    ranks."""
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
