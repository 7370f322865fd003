"""Run a job whose output is a sequence of shards: on any number of workers, in any number of runs.

A shard is a file that one worker writes atomically. Its content depends on its position only, so
neither the number of workers nor an interruption changes the output, and a run that was killed
resumes with the shards that are missing.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from dimr_fast.utils.distributed import Worker, run_processes
from dimr_fast.utils.files import remove_unfinished

M = TypeVar("M")
Progress = Callable[[int], object]
"""Called with the number of images that were finished since the last call."""


@dataclass(frozen=True)
class Shard:
    """One file of the output, the shard's position in the sequence, and the images it holds."""

    path: Path
    index: int
    images: slice

    def __len__(self) -> int:
        return int(self.images.stop - self.images.start)


def split_into_shards(count: int, size: int, path: Callable[[int, int], Path]) -> list[Shard]:
    """Split `count` images into shards of `size`; `path(index, start)` names a shard's file."""
    return [
        Shard(path(index, start), index, slice(start, min(start + size, count)))
        for index, start in enumerate(range(0, count, size))
    ]


class ShardedJob(Protocol[M]):
    """Interface of a job for `run_sharded`. It must be picklable, for worker processes."""

    @property
    def shards(self) -> Sequence[Shard]: ...

    def load(self, device: torch.device) -> M:
        """Load the model that makes shards, in a worker process."""
        ...

    def is_complete(self, shard: Shard) -> bool:
        """Return whether an earlier run has written this shard."""
        ...

    def make(self, shard: Shard, model: M, worker: Worker, progress: Progress) -> None:
        """Write a shard."""
        ...


def choose_process_count(
    requested: int | None, worker: Worker, device: torch.device, on_cpu: int
) -> int:
    """Return how many processes to start.

    Return `requested` if it is given. Otherwise return 1 if a launcher has started several
    processes, the number of GPUs if `device` is "cuda" without an index, 1 if it names one GPU, and
    `on_cpu` on a CPU.
    """
    if requested is not None:
        return requested
    if worker.world_size > 1:
        return 1
    if device.type == "cuda":
        return torch.cuda.device_count() if device.index is None else 1
    return on_cpu


def run_sharded(
    job: ShardedJob[M],
    model: M | None,
    worker: Worker,
    device: torch.device,
    processes: int,
    description: str,
) -> None:
    """Write this worker's shards that are missing, with a progress bar.

    If `model` is given, this process makes the shards. If it is None, `processes` child processes
    are started; each loads its own model and makes a part of the shards. Raises what `make` raises,
    ChildProcessError for a child process that failed.
    """
    processes = min(processes, len(job.shards))
    workers = [worker.child(index, processes) for index in range(processes)]
    total = sum(len(shard) for own in workers for shard in _shards_of(job, own))
    with tqdm(total=total, unit="image", desc=description, disable=not worker.is_main) as bar:
        if model is not None:
            _make_missing(job, model, worker, bar.update)
            return
        done = torch.zeros(processes, dtype=torch.int64).share_memory_()
        threads = max(1, torch.get_num_threads() // processes)
        run_processes(
            _run_worker,
            (job, workers, device, threads, done),
            processes,
            lambda: bar.update(int(done.sum()) - bar.n),
        )


@contextmanager
def heartbeat(path: Path, interval: float = 5.0) -> Iterator[None]:
    """Touch the file `path` every `interval` seconds, in a thread, until the block ends.

    So a process on another machine that shares the folder can tell slow from dead.
    """
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(interval):
            with suppress(OSError):  # the folder may be full, or removed by rank 0 at the end
                path.touch()

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Heartbeats:
    """Measure the age of heartbeats in files, by the clock of this process only."""

    def __init__(self) -> None:
        self._changes: dict[Path, tuple[int, float]] = {}

    def age(self, path: Path) -> float:
        """Return the seconds since `path` was seen to change, or since the first call for it."""
        try:
            touched = path.stat().st_mtime_ns
        except OSError:  # not there yet, or a network drive that fails for a moment
            touched = 0
        now = time.monotonic()
        if path not in self._changes or self._changes[path][0] != touched:
            self._changes[path] = touched, now
        return now - self._changes[path][1]


def _shards_of(job: ShardedJob[M], worker: Worker) -> Sequence[Shard]:
    return job.shards[worker.rank :: worker.world_size]


def _run_worker(
    index: int,
    job: ShardedJob[M],
    workers: list[Worker],
    device: torch.device,
    threads: int,
    done: Tensor,
) -> None:
    """Run in a child process; `done[index]` counts its images for the parent's progress bar."""
    torch.set_num_threads(threads)
    worker = workers[index]

    def progress(images: int) -> None:
        done[index] += images

    _make_missing(job, job.load(worker.device(device)), worker, progress)


def _make_missing(job: ShardedJob[M], model: M, worker: Worker, progress: Progress) -> None:
    for shard in _shards_of(job, worker):
        remove_unfinished(shard.path.parent, shard.path.name)
        if job.is_complete(shard):
            progress(len(shard))
        else:
            job.make(shard, model, worker, progress)
