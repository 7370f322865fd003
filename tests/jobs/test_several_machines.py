"""Jobs on two machines, of which one is killed or loses its network."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.report.processes import sent
from dimr_fast.checkpoint import load_checkpoint, load_model
from dimr_fast.data.latents import MANIFEST
from dimr_fast.sampling import SamplerConfig, sample
from dimr_fast.training.state import CHECKPOINT
from tests.support.autoencoder import save_autoencoder
from tests.support.models import trained_model
from tests.support.runs import contents, noise_images, reached
from tests.support.sampling import command_words, small_job
from tests.support.sampling import contents as files_of

pytest.importorskip("accelerate", reason="needs the accelerate package")
pytest.importorskip("psutil", reason="needs the psutil package")

from tests.support.hosts import Host, two_hosts

pytestmark = pytest.mark.slow

STEPS = 10
SECONDS = 300
"""Limit of a wait; a busy machine needs a minute to start two launchers."""
IMPATIENT = """
import sys
from dimr_fast.cli import main_of_process
from dimr_fast.training import run
from dimr_fast.utils import peers

peers.IDLE, peers.INTERVAL, peers.PROBES = 1, 1, 3
run.SHARED_TIMEOUT = 1.0
if __name__ == "__main__":
    sys.exit(main_of_process(["train", *sys.argv[1:]]))
"""
"""`python -m dimr_fast.training` with shorter limits."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of two processes on this machine."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    launch = ["--standalone", "--nproc-per-node=2"]
    words = [sys.executable, "-m", "torch.distributed.run", *launch, *training(images, run)]
    subprocess.run(words, check=True, capture_output=True, timeout=SECONDS)
    return run


def training(images: Path, output: Path, *changes: str) -> list[str]:
    """Return the words of a run that writes a checkpoint after every step."""
    settings = [
        f"data={images}",
        "preset=tiny",
        "minutes=none",
        f"steps={STEPS}",
        "batch_size=8",
        "precision=fp32",
        "device=cpu",
        "checkpoint_minutes=1e-9",
        *changes,
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    return ["-m", "dimr_fast.training", "--output", str(output), *words]


def launch(
    hosts: tuple[Host, ...], words: list[str], processes: int = 1, folders: tuple[Path, ...] = ()
) -> list["subprocess.Popen[str]"]:
    """Start the same torchrun command on each host, in its own of the `folders` if given."""
    started = []
    for number, host in enumerate(hosts):
        rendezvous = {
            "--nnodes": len(hosts),
            "--nproc-per-node": processes,
            "--rdzv-backend": "c10d",
            "--rdzv-id": "test",
            "--rdzv-endpoint": f"{hosts[0].address}:29400",
            # All namespaces have the name of this machine, by which torchrun finds the host.
            "--rdzv-conf": f"is_host={int(number == 0)}",
            "--local-addr": host.address,
        }
        options = [f"{name}={value}" for name, value in rendezvous.items()]
        command = [sys.executable, "-m", "torch.distributed.run", *options, *words]
        started.append(host.start(command, cwd=folders[number] if folders else None))
    return started


def finish(processes: list["subprocess.Popen[str]"]) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, output[-3000:]


def wait_until(
    ready: Callable[[], bool], processes: list["subprocess.Popen[str]"], hosts: tuple[Host, ...]
) -> None:
    deadline = time.monotonic() + SECONDS
    while not ready():
        if time.monotonic() > deadline or any(p.poll() is not None for p in processes):
            for host in hosts:
                host.kill()
            pytest.fail("\n".join(p.communicate()[0][-3000:] for p in processes))
        time.sleep(0.005)


def lost_run(
    hosts: tuple[Host, Host],
    words: list[str],
    run: Path,
    end: Callable[[], None],
    survivor: int,
    limit: float,
) -> str:
    """Train on both hosts, `end` one of them after three steps; return the survivor's output."""
    processes = launch(hosts, words)
    wait_until(lambda: reached(run / CHECKPOINT) >= 3, processes, hosts)
    end()
    start = time.monotonic()
    output, _ = processes[survivor].communicate(timeout=SECONDS)
    assert time.monotonic() - start < limit
    assert processes[survivor].returncode == 1  # torchrun's
    for host in hosts:
        host.kill()
    assert load_checkpoint(run / CHECKPOINT)[1]["step"] >= 3
    return output


@pytest.mark.parametrize("killed", [0, 1])
def test_a_run_that_lost_a_host_goes_on_with_the_hosts_that_are_left(
    hosts: tuple[Host, Host], images: Path, undisturbed: Path, tmp_path: Path, killed: int
) -> None:
    run = tmp_path / "run"
    words = training(images, run)
    survivor = 1 - killed
    output = lost_run(hosts, words, run, hosts[killed].kill, survivor, 60)
    assert f"dimr-fast: error: lost process {killed} on " in output
    assert f"({hosts[killed].address})" in output
    assert "start the run again with --resume" in output
    assert "Traceback" not in output.split("dimr-fast: error")[0]

    shutil.copytree(run, tmp_path / "alone")
    shutil.copytree(run, tmp_path / "again")
    # Two processes on the host that is left, both hosts again, one process.
    finish(launch((hosts[survivor],), [*words, "--resume"], processes=2))
    if killed == 1:
        words = training(images, tmp_path / "again")
        finish(launch(hosts, [*words, "--resume"]))
        words = training(images, tmp_path / "alone")
        finish(launch((hosts[survivor],), [*words, "--resume"]))
        one, two = contents(tmp_path / "alone"), contents(undisturbed)
        assert one.keys() == two.keys()
        torch.testing.assert_close(one["losses"], two["losses"], rtol=1e-3, atol=1e-4)
    for folder in (run, tmp_path / "again") if killed == 1 else (run,):
        found, expected = contents(folder), contents(undisturbed)
        assert found.keys() == expected.keys()
        assert len(found["losses"]) == STEPS
        assert [n for n in found if not torch.equal(found[n], expected[n])] == []
        assert not list(folder.glob(".*.part"))


def test_a_host_without_power_is_noticed(images: Path, tmp_path: Path) -> None:
    """No packet says that it is gone: the connection is silent, and collectives wait for hours.

    Before, the steps send what the benchmark's formula says.
    """
    script, run = tmp_path / "impatient.py", tmp_path / "run"
    script.write_text(IMPATIENT)
    words = training(images, run, "steps=1000000")
    bytes_of_a_step: list[float] = []

    def measure_and_disconnect() -> None:
        begin, before = reached(run / CHECKPOINT), hosts[0].sent()
        while (now := reached(run / CHECKPOINT)) < begin + 20:
            time.sleep(0.005)
        bytes_of_a_step.append((hosts[0].sent() - before) / (now - begin))
        hosts[1].disconnect()

    with two_hosts() as hosts:
        output = lost_run(hosts, [str(script), *words[2:]], run, measure_and_disconnect, 0, 90)
    assert "dimr-fast: error: lost process 1 on " in output
    model = load_model(run / CHECKPOINT).model
    gradients = sum(p.nbytes for p in model.parameters())
    assert 0.85 < bytes_of_a_step[0] / sent("all-reduce", gradients, 2) < 1.25


@pytest.mark.parametrize("resumed", [False, True])
def test_a_folder_that_the_hosts_do_not_share_is_an_error(
    hosts: tuple[Host, Host], images: Path, undisturbed: Path, tmp_path: Path, resumed: bool
) -> None:
    script = tmp_path / "impatient.py"
    script.write_text(IMPATIENT)
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
    words = training(images, Path("run"))
    if resumed:
        shutil.copytree(undisturbed, folders[0] / "run")
        words.append("--resume")
    for process in launch(hosts, [str(script), *words[2:]], folders=folders):
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 1
        assert "dimr-fast: error: output: got run, where checkpoint.safetensors is not" in output
        assert "by 1 of 2 processes (1); expected a folder that all machines share" in output


def test_an_extraction_goes_on_with_the_host_that_is_left(
    hosts: tuple[Host, Host], images: Path, tmp_path: Path
) -> None:
    autoencoder = save_autoencoder(tmp_path / "autoencoder", blocks=2)

    def words(output: Path) -> list[str]:
        options = {
            "--images": images,
            "--autoencoder": autoencoder,
            "--output": output,
            "--image-size": 128,
            "--shard-size": 1,
            "--batch-size": 1,
            "--processes": 1,
            "--device": "cpu",
        }
        return ["-m", "dimr_fast", "extract", *(str(w) for pair in options.items() for w in pair)]

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run([sys.executable, *words(whole)], check=True, capture_output=True)
    processes = launch(hosts, words(parts))
    wait_until((parts / "shard-00001.safetensors").exists, processes, hosts)
    hosts[1].kill()
    # The other process finishes its share; its launcher then waits five minutes for the other.
    stream = processes[0].stdout
    assert stream is not None
    assert any("If one of them was killed, give the command again" in line for line in stream)
    hosts[0].kill()
    processes[0].wait(timeout=SECONDS)
    assert not (parts / MANIFEST).exists()
    assert (parts / "shard-00018.safetensors").exists()
    finish(launch((hosts[0],), words(parts)))
    assert files_of(parts) == files_of(whole)


def test_a_sampling_job_goes_on_with_the_host_that_is_left(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    trained = trained_model()
    sampler = SamplerConfig(steps=60, batch_size=1, precision="fp32")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    sample(small_job(trained, whole, sampler=sampler))
    job = small_job(trained, parts, sampler=sampler)
    words = ["-m", "dimr_fast", *command_words(job), "--device", "cpu"]
    processes = launch(hosts, words)
    wait_until((job.output / "parts" / "00000001.npy").exists, processes, hosts)
    hosts[1].kill()
    wait_until((job.output / "parts" / "00000010.npy").exists, processes[:1], hosts)
    kept = (job.output / "parts" / "00000010.npy").stat().st_mtime_ns
    # Rank 0 waits for the other process, of which it only sees that it is silent.
    assert processes[0].poll() is None
    hosts[0].kill()
    processes[0].wait(timeout=SECONDS)
    assert (job.output / "parts" / "00000010.npy").stat().st_mtime_ns == kept
    finish(launch((hosts[0],), words))
    assert files_of(job.output) == files_of(whole / "out")
