"""Sampling and converting a file on the Hub, with a local stand-in for it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dimr_fast import cli
from dimr_fast.checkpoint import TrainedModel
from dimr_fast.utils.tensors import read_tensors
from tests.support.hub_server import hub_server
from tests.support.models import trained_model, write_checkpoint

WEIGHTS = "someone/Models:tiny_800epochs.pth"
CHECKPOINT = "someone/Models:sub/checkpoint.safetensors"


@pytest.fixture(scope="module")
def model() -> TrainedModel:
    return trained_model()


@pytest.fixture
def hub(model: TrainedModel, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    folder = tmp_path / "hub" / "someone" / "Models" / "sub"
    folder.mkdir(parents=True)
    torch.save(model.model.state_dict(), folder.parent / "tiny_800epochs.pth")
    write_checkpoint(model, folder / "checkpoint.safetensors")
    (folder / "words.pth").write_text("no weights")
    with hub_server(tmp_path / "hub") as served:
        yield served


def command(
    tmp_path: Path, endpoint: str, *words: object, **environment: str
) -> tuple[int, str, str]:
    """Run a command with empty caches of its own; return exit status and output."""
    caches = {"HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "dimr_fast", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, **caches, "HF_ENDPOINT": endpoint, **environment},
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def sample(output: Path, checkpoint: str = CHECKPOINT) -> tuple[object, ...]:
    settings = ("--count", "6", "--steps", "3", "--precision", "fp32", "--formats", "grid", "npz")
    return ("sample", "--checkpoint", checkpoint, "--output", output, *settings)


def test_a_file_on_the_hub_is_sampled(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, requests = hub
    status, _, errors = command(tmp_path, endpoint, *sample(tmp_path / "first"))
    assert status == 0, errors
    path = "/someone/Models/resolve/main/sub/checkpoint.safetensors"
    assert f"HEAD {path}" in requests
    assert requests.count(f"GET {path}") == 1

    # The same images as from the file itself.
    source = tmp_path / "hub/someone/Models/sub/checkpoint.safetensors"
    assert cli.main([str(word) for word in sample(tmp_path / "local", str(source))]) == 0
    for name in ("grid.png", "samples.npz"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    record = json.loads((tmp_path / "first" / "sample.json").read_text())
    assert "someone--Models--sub--checkpoint.safetensors" in record["checkpoint"]

    # From the caches, without a network.
    status, _, errors = command(tmp_path, endpoint, *sample(tmp_path / "again"), HF_HUB_OFFLINE="1")
    assert status == 0, errors
    assert requests.count(f"GET {path}") == 1


def test_a_file_on_the_hub_is_converted(
    hub: tuple[str, list[str]], model: TrainedModel, tmp_path: Path
) -> None:
    output = tmp_path / "model.safetensors"
    words = ("convert", "--input", WEIGHTS, "--output", output)
    status, said, errors = command(tmp_path, hub[0], *words)
    assert status == 0, errors
    assert f"wrote {output}" in said
    loaded = read_tensors(output)[0]
    expected = model.model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("someone/Models:none.pth", "the Hugging Face Hub has no such file"),
        ("someone/Models:sub/words.pth", "words.pth: not a readable .pth file"),
    ],
)
def test_a_file_that_is_no_model_is_named(
    hub: tuple[str, list[str]], tmp_path: Path, checkpoint: str, message: str
) -> None:
    status, _, errors = command(tmp_path, hub[0], *sample(tmp_path / "out", checkpoint))
    assert status == 2
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_a_network_one_line_says_so(tmp_path: Path) -> None:
    status, said, errors = command(
        tmp_path, "http://127.0.0.1:9", *sample(tmp_path / "out"), HF_HUB_OFFLINE="1"
    )
    assert (status, said) == (2, "")
    assert errors == (
        f"dimr-fast: error: {CHECKPOINT}: not downloaded, since the Hugging Face Hub cannot be "
        "reached; download the file where there is a network, and give its path\n"
    )
