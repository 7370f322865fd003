"""Errors of an evaluation: bad images, bad settings, disks that are full."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from dimr_fast.evaluation import evaluate
from dimr_fast.sampling import SamplerConfig
from tests.support.evaluation import Colours, small_evaluation
from tests.support.files import file_size_limit
from tests.support.image_files import random_images, write_folder


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return write_folder(random_images(20, seed=1), tmp_path / "real")


@pytest.fixture
def network() -> Colours:
    return Colours()


def bad_folder(tmp_path: Path) -> Path:
    return write_folder(random_images(12), tmp_path / "fake")


def truncated(tmp_path: Path) -> Path:
    folder = bad_folder(tmp_path)
    for name in ("0003.png", "0007.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-30])
    return folder


def mixed(tmp_path: Path) -> Path:
    folder = bad_folder(tmp_path)
    Image.new("RGB", (40, 20)).save(folder / "grid.png")
    return folder


def empty(tmp_path: Path) -> Path:
    (tmp_path / "fake").mkdir()
    return tmp_path / "fake"


def floats(tmp_path: Path) -> Path:
    np.savez(tmp_path / "fake.npz", arr_0=np.zeros((12, 16, 16, 3), np.float32))
    return tmp_path / "fake.npz"


def other_arrays(tmp_path: Path) -> Path:
    np.savez(tmp_path / "fake.npz", images=np.zeros((12, 16, 16, 3), np.uint8))
    return tmp_path / "fake.npz"


def no_npz(tmp_path: Path) -> Path:
    (tmp_path / "fake.npz").write_text("text")
    return tmp_path / "fake.npz"


def few(tmp_path: Path) -> Path:
    return write_folder(random_images(9), tmp_path / "fake")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (truncated, r"images: got 2 of 12 files in .*cannot be read, first .*0003\.png"),
        (mixed, r"several sizes in .*: 12 of 16x16, 1 of 40x20, such as .*grid\.png"),
        (empty, r"images: got .*fake without images, expected some of \.avif"),
        (floats, r"images: got arr_0 of float32 \(12, 16, 16, 3\)"),
        (other_arrays, r"images: got .* with images, expected arr_0"),
        (no_npz, r"images: got .*fake\.npz, expected an \.npz file"),
        (few, "images: got 9 images, expected 10 or more"),
        (lambda path: path / "missing", r"images: got .*missing, expected a folder"),
    ],
)
def test_unusable_images_are_named_before_any_work(
    tmp_path: Path, reference: Path, network: Colours, images: Any, message: str
) -> None:
    path = images(tmp_path)
    with pytest.raises(ValueError, match=message):
        evaluate(small_evaluation(tmp_path, reference, images=path), network=network)
    with pytest.raises(ValueError, match=message.replace("images: got 9", "reference: got 9")):
        evaluate(small_evaluation(tmp_path, path, images=reference), network=network)
    assert not (tmp_path / "out").exists()
    assert network.calls == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "images, checkpoint: got 0 of them, expected one"),
        ({"images": "fake", "checkpoint": "x"}, "images, checkpoint: got 2 of them"),
        ({"checkpoint": "x", "count": 9}, "count: got 9, expected 10 or more"),
        ({"images": "fake", "sampler": SamplerConfig(steps=0)}, "steps: got 0"),
        ({"images": "fake", "inception_weights": "missing"}, "inception_weights: got .*https://"),
    ],
)
def test_bad_settings_are_named_before_any_work(
    tmp_path: Path, reference: Path, changes: dict[str, Any], message: str
) -> None:
    bad_folder(tmp_path)
    paths = {n: tmp_path / v if isinstance(v, str) else v for n, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        evaluate(small_evaluation(tmp_path, reference, **paths))
    assert not (tmp_path / "out").exists()


def test_scores_that_cannot_be_written_are_in_the_error(tmp_path: Path, reference: Path) -> None:
    class Blocking(Colours):
        """Makes writing the report fail, after the check that it can be written."""

        def forward(self, images: Tensor) -> Tensor:
            (tmp_path / "out" / "evaluation.json").mkdir(exist_ok=True)
            return super().forward(images)

    job = small_evaluation(tmp_path, reference, images=bad_folder(tmp_path))
    with pytest.raises(OSError, match=r"written.*; the scores are\nFréchet distance on .*: \d"):
        evaluate(job, network=Blocking())


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, reference: Path, network: Colours, capsys: pytest.CaptureFixture[str]
) -> None:
    images = bad_folder(tmp_path)
    job = small_evaluation(tmp_path, reference, images=images)
    expected = evaluate(job, network=network).distance
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file")
    capsys.readouterr()
    again = dataclasses.replace(job, output=tmp_path / "again")
    assert evaluate(again, network=network).distance == expected
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("statistics of the reference not cached: ")]


def test_a_full_disk_while_the_cache_is_written_is_no_error(
    tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wide(Colours):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).repeat(1, 500)

    job = small_evaluation(tmp_path, reference, images=bad_folder(tmp_path))
    with file_size_limit(64_000):
        evaluate(job, network=Wide())
    assert "not cached" in capsys.readouterr().err
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_unfinished_report_of_a_killed_evaluation_is_removed(
    reference: Path, network: Colours, tmp_path: Path
) -> None:
    images = write_folder(random_images(12), tmp_path / "fake")
    job = small_evaluation(tmp_path, reference, images=images)
    job.output.mkdir()
    (job.output / ".evaluation.json.1.part").write_text("half of it")
    evaluate(job, network=network)
    assert [path.name for path in job.output.iterdir()] == ["evaluation.json"]
