"""Files that hold no usable weights: each message says what the file is and what to do."""

import argparse
import os
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dimr_fast import DiMR, cli
from dimr_fast.checkpoint import CheckpointError, load_model, load_published, save_model
from tests.support.models import randomised, trained_model, write_checkpoint


@pytest.fixture(scope="module")
def model() -> DiMR:
    return randomised(DiMR.from_preset("tiny"))


@pytest.fixture
def published(model: DiMR, tmp_path: Path) -> Path:
    torch.save(model.state_dict(), tmp_path / "nnet.pth")
    return tmp_path / "nnet.pth"


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Return the one line that a command prints on failing."""
    assert cli.main([str(word) for word in words]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    for unwanted in ("\x1b", "two options", "weights_only", "Traceback"):
        assert unwanted not in text
    return text


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7])
def test_a_flipped_byte_is_detected(published: Path, place: float) -> None:
    """torch does not compare the checksums of the archive."""
    content = bytearray(published.read_bytes())
    content[int(place * len(content))] ^= 1
    published.write_bytes(content)
    with zipfile.ZipFile(published) as archive:
        damaged = archive.testzip()
    assert damaged is not None
    with pytest.raises(CheckpointError, match=rf"nnet.pth: damaged: the checksum of {damaged}"):
        load_published(published)


def test_a_file_that_was_saved_without_checksums_is_read(model: DiMR, tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(model.state_dict(), tmp_path / "fast.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    state = load_published(tmp_path / "fast.pth")
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("holds", "name"),
    [
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"ema": {}, "args": argparse.Namespace()}, "argparse.Namespace"),
        ({"rng": random.Random()}, "random.Random"),
    ],
)
def test_python_objects_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], zipped: bool, holds: object, name: str
) -> None:
    path = tmp_path / "whole.pth"
    torch.save(holds, path, _use_new_zipfile_serialization=zipped)
    text = error_of(capsys, "convert", "--input", path, "--output", tmp_path / "o")
    assert f"{path}: not a readable .pth file: it holds Python objects" in text
    assert "torch.save(model.state_dict()" in text
    assert name in text or not zipped


def lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lfs, "a Git LFS pointer, not the file itself; fetch it: git lfs pull"),
        (lambda path: path.write_bytes(b""), "an empty file"),
        (lambda path: path.mkdir(), "there is no config.json in it"),
        (lambda path: None, "no such file"),
        (lambda path: path.write_text("some words, no weights"), "not a readable"),
    ],
)
def test_what_a_file_is(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    suffix: str,
    write: Callable[[Path], object],
    message: str,
) -> None:
    path = tmp_path / f"x.{suffix}"
    write(path)
    for words in (("convert", "--input", path), ("sample", "--checkpoint", path)):
        text = error_of(capsys, *words, "--output", tmp_path / "o")
        assert str(path) in text
        assert message in text
    assert not (tmp_path / "o").exists()


def test_other_commands_say_how_to_convert_a_file(
    published: Path, model: DiMR, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    out = tmp_path / "o"
    assert cli.main(["convert", "--input", str(published), "--output", f"{out}.safetensors"]) == 0
    capsys.readouterr()
    for path in (published, tmp_path / "old.pt", Path(f"{out}.safetensors")):
        for command in (
            ("sample", "--checkpoint", path, "--output", out),
            ("evaluate", "--checkpoint", path, "--reference", "tiles", "--output", out),
            ("export", "--checkpoint", path, "--output", out),
        ):
            text = error_of(capsys, *command)
            assert f"convert it first: dimr-fast convert --input {path} --output FOLDER" in text


def test_a_run_in_place_of_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(trained_model(), tmp_path / "checkpoint.safetensors")
    checkpoint = tmp_path / "checkpoint.safetensors"
    for command in (
        ("sample", "--checkpoint", tmp_path, "--output", tmp_path / "o"),
        ("export", "--checkpoint", tmp_path, "--output", tmp_path / "o"),
        ("convert", "--input", tmp_path, "--output", tmp_path / "o"),
    ):
        assert f"its checkpoint is {checkpoint}" in error_of(capsys, *command)


def test_missing_and_extra_weights_are_named(
    model: DiMR, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, path = model.state_dict(), tmp_path / "x.pth"
    name = "stages.0.blocks.0.block2.w1.bias"
    convert = ("convert", "--input", path, "--output", tmp_path / "o")
    torch.save({key: value for key, value in state.items() if key != name}, path)
    for words in (convert, (*convert, "--preset", "tiny")):
        assert f"{name} is missing" in error_of(capsys, *words)
    torch.save({**state, "optimizer.step": torch.zeros(1)}, path)
    for words in (convert, (*convert, "--preset", "tiny")):
        assert "optimizer.step is not a weight of the model" in error_of(capsys, *words)


def test_weights_of_several_dtypes_are_named(
    model: DiMR, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "stages.0.blocks.0.block2.w1.bias"
    mixed = {**model.state_dict(), name: model.state_dict()[name].bfloat16()}
    torch.save(mixed, tmp_path / "x.pth")
    text = error_of(capsys, "convert", "--input", tmp_path / "x.pth", "--output", tmp_path / "o")
    assert f"bfloat16, such as {name}" in text
    assert "float32, such as stages.0.input_layer.1.weight" in text
    assert "expected one dtype" in text
    save_model(trained_model(), tmp_path / "good")
    assert load_model(tmp_path / "good").classes == tuple("abcdef")


@pytest.mark.skipif(
    hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("setpriv") is None,
    reason="root may read everything, and there is no setpriv to give that up",
)
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_file_without_permission_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"secret")
    path.chmod(0)
    words = [sys.executable, "-m", "dimr_fast", "convert", "--input", str(path), "--output", "o"]
    if os.geteuid() == 0:
        drop = "-dac_override,-dac_read_search"
        words = ["setpriv", f"--bounding-set={drop}", f"--inh-caps={drop}", *words]
    result = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2
    assert f"{path}: not a readable" in result.stderr
    assert "no permission to read it" in result.stderr
