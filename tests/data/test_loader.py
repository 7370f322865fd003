"""Batches of training: every example once per epoch, on any number of processes."""

import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import islice

import pytest
import torch

from dimr_fast.data.arrays import ImageArray
from dimr_fast.data.images import UnreadableImageError
from dimr_fast.data.loader import Batch, Loader, batch_indices
from tests.support.files import file_size_limit

COUNT = 53


@pytest.fixture
def examples() -> ImageArray:
    """Return images of which image i has value i in its left half and 200 in its right one."""
    images = torch.arange(COUNT, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 4, 4)
    images[..., 2:] = 200
    return ImageArray(images, torch.arange(COUNT) % 5, ("a", "b", "c", "d", "e"))


def take(loader: Loader, count: int) -> list[Batch]:
    return list(islice(loader, count))


def test_every_example_occurs_once_per_epoch_in_a_new_order(examples: ImageArray) -> None:
    batches = take(Loader(examples, 7), 2 * COUNT // 7 + 1)
    seen = torch.cat([batch.indices for batch in batches])
    first, second = seen[:COUNT], seen[COUNT : 2 * COUNT]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(COUNT))
    assert not torch.equal(first, second)
    other = torch.cat([batch.indices for batch in take(Loader(examples, 7, seed=1), 8)])
    assert not torch.equal(other[:50], first[:50])


def test_half_of_the_images_are_mirrored_and_labels_match(examples: ImageArray) -> None:
    mirrored = 0
    for batch in take(Loader(examples, 10), 40):
        assert torch.equal(batch.labels, batch.indices % 5)
        flipped = batch.raw[:, 0, 0, 0] == 200
        plain = torch.where(flipped[:, None, None, None], batch.raw.flip(3), batch.raw)
        assert torch.equal(plain, examples.images[batch.indices])
        mirrored += int(flipped.sum())
    assert 150 < mirrored < 250
    for batch in take(Loader(examples, 10, mirror=False), 5):
        assert torch.equal(batch.raw, examples.images[batch.indices])


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_share_each_batch_without_overlap_or_loss(
    examples: ImageArray, processes: int
) -> None:
    alone = take(Loader(examples, 12), 10)
    loaders = [Loader(examples, 12, rank=r, world_size=processes) for r in range(processes)]
    for whole, *parts in zip(alone, *(take(loader, 10) for loader in loaders), strict=True):
        assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices)
        assert torch.equal(torch.cat([part.raw for part in parts]), whole.raw)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)


def test_the_state_resumes_in_the_middle_of_an_epoch(examples: ImageArray) -> None:
    whole = take(Loader(examples, 7), 12)
    loader = Loader(examples, 7)
    before = take(loader, 5)
    resumed = Loader(examples, 7)
    resumed.load_state_dict(loader.state_dict())
    after = take(resumed, 7)
    assert [batch.step for batch in before + after] == list(range(12))
    for one, other in zip(whole, before + after, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.raw, other.raw)


def test_workers_that_read_ahead_change_nothing(examples: ImageArray) -> None:
    loader = Loader(examples, 7, workers=2)
    for one, other in zip(take(Loader(examples, 7), 6), take(loader, 6), strict=True):
        assert torch.equal(one.raw, other.raw)
    # Batches that workers have read ahead do not count.
    assert loader.state_dict() == {"step": 6}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_example_is_a_one_line_error(examples: ImageArray, workers: int) -> None:
    class Damaged(ImageArray):
        def read(self, indices: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
            raise UnreadableImageError("a.png: not a readable image (cut short)", "cut short")

    bad = Damaged(examples.images, examples.labels, examples.classes)
    with pytest.raises(UnreadableImageError, match=r"^a\.png: not a readable image \(cut short\)$"):
        next(iter(Loader(bad, 4, workers=workers)))


TOO_LITTLE = r"workers: got 1, .* shared memory \(/dev/shm\).*, expected fewer or 0, or more shared"


def large_images() -> ImageArray:
    """Images of which a batch of eight takes 1.5 MiB."""
    images = torch.arange(8, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 256, 256)
    return ImageArray(images, torch.arange(8), tuple("abcdefgh"))


def test_too_little_shared_memory_is_an_error_that_names_it() -> None:
    """torch would print a traceback and wait for the batch for ever."""
    with file_size_limit(2**20), pytest.raises(OSError, match=TOO_LITTLE):
        next(iter(Loader(large_images(), 8, workers=1)))


IN_SMALL_MEMORY = """
from tests.data.test_loader import Loader, large_images
try:
    for batch in Loader(large_images(), 8, workers=1):
        kept.append(batch) if batch.step else (kept := [batch])
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("size", ["4m", "4k"])
def test_shared_memory_that_fills_up_later_and_has_no_room_at_all(size: str) -> None:
    """As in a container: 4 MiB hold two batches; 4 KiB not even the queues of the workers."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    words = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*words, mount], capture_output=True, check=False).returncode
    ):
        pytest.skip("this system lets nobody mount a small /dev/shm")
    words += [f"{mount}; exec {sys.executable} -c '{IN_SMALL_MEMORY}'"]
    result = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert re.match(TOO_LITTLE, result.stdout), result.stdout + result.stderr


class Killed(ImageArray):
    """Images whose reader is killed, as by a system without memory."""

    def read(self, indices: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().read(indices, mirrored)


def test_a_worker_that_is_killed_is_an_error_that_names_the_setting(examples: ImageArray) -> None:
    bad = Killed(examples.images, examples.labels, examples.classes)
    with pytest.raises(OSError, match=r"workers: got 1, one of which was killed, .*expected fewer"):
        next(iter(Loader(bad, 4, workers=1)))


def test_a_batch_may_hold_several_epochs() -> None:
    indices = batch_indices(3, 10, seed=0, step=1)
    assert len(indices) == 10
    whole = torch.cat([batch_indices(3, 10, seed=0, step=step) for step in range(3)])
    assert all(sorted(whole[i : i + 3].tolist()) == [0, 1, 2] for i in range(0, 30, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"batch_size": 9, "world_size": 2}, "batch_size: got 9, expected a multiple of the 2"),
        ({"batch_size": 8, "world_size": 2, "rank": 2}, "rank: got 2"),
    ],
)
def test_bad_settings_are_named(
    examples: ImageArray, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Loader(examples, **settings)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2).long(), "images: got torch.float32"),
        (torch.zeros(0, 3, 4, 4).byte(), torch.zeros(0).long(), "images: got"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(3).long(), "labels: got"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.tensor([0, 2]), r"labels: got 0\.\.2"),
    ],
)
def test_an_array_of_images_is_checked(
    images: torch.Tensor, labels: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ImageArray(images, labels, ("a", "b"))
