"""Sampling and converting a file on the Hub, with a local stand-in for it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dimr_fast import DiMR, cli
from tests.support.hub_server import hub_server
from tests.support.models import randomised

MODEL = "someone/Models:sub/tiny_800epochs.pth"


@pytest.fixture(scope="module")
def model() -> DiMR:
    return randomised(DiMR.from_preset("tiny"))


@pytest.fixture
def hub(model: DiMR, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    folder = tmp_path / "hub" / "someone" / "Models" / "sub"
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / "tiny_800epochs.pth")
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


def sample(output: Path, checkpoint: str = MODEL) -> tuple[object, ...]:
    settings = ("--count", "6", "--steps", "3", "--precision", "fp32", "--formats", "grid", "npz")
    return ("sample", "--checkpoint", checkpoint, "--output", output, *settings)


def test_a_file_on_the_hub_is_sampled(
    hub: tuple[str, list[str]], model: DiMR, tmp_path: Path
) -> None:
    endpoint, requests = hub
    status, _, errors = command(tmp_path, endpoint, *sample(tmp_path / "first"))
    assert status == 0, errors
    path = "/someone/Models/resolve/main/sub/tiny_800epochs.pth"
    assert f"HEAD {path}" in requests
    assert requests.count(f"GET {path}") == 1

    # The same images as from the file, converted by hand.
    source = tmp_path / "hub/someone/Models/sub/tiny_800epochs.pth"
    words = ["convert", "--input", str(source), "--output", str(tmp_path / "model")]
    assert cli.main(words) == 0
    assert cli.main([str(w) for w in sample(tmp_path / "local", str(tmp_path / "model"))]) == 0
    for name in ("grid.png", "samples.npz"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    record = json.loads((tmp_path / "first" / "sample.json").read_text())
    assert "someone--Models--sub--tiny_800epochs.pth" in record["checkpoint"]

    # From the caches, without a network.
    status, _, errors = command(tmp_path, endpoint, *sample(tmp_path / "again"), HF_HUB_OFFLINE="1")
    assert status == 0, errors
    assert requests.count(f"GET {path}") == 1


def test_a_file_on_the_hub_is_converted(
    hub: tuple[str, list[str]], model: DiMR, tmp_path: Path
) -> None:
    words = ("convert", "--input", MODEL, "--output", tmp_path / "model")
    status, said, errors = command(tmp_path, hub[0], *words)
    assert status == 0, errors
    assert f"wrote {tmp_path / 'model'}" in said
    loaded = DiMR.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


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
        f"dimr-fast: error: {MODEL}: not downloaded, since the Hugging Face Hub cannot be reached; "
        "download the file where there is a network, and give its path\n"
    )
