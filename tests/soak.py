"""Disturb jobs at random moments, resume them, and compare them with undisturbed ones.

    python tests/soak.py --minutes 2

Each cycle runs a job of a second or two from the beginning. One attempt after the other is
disturbed: it gets a signal, the disk is full for a while, or its folder can only be read for a
while. The attempt after the last disturbance is left alone. What the job has written is then
compared with what an undisturbed job wrote, bit for bit. The disturbances of a cycle and their
moments, as fractions of the job's time, are derived from the seed and the number of the cycle.

The jobs are forked from this process, which has run each of them once, so that they need no time to
import modules and to fill caches. The disk is a small tmpfs in a mount namespace of this process.
"""

import argparse
import collections
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for `benchmarks` and `tests`

OWN_MOUNTS = "DIMR_FAST_SOAK_OWN_MOUNTS"
"""Environment variable that is set once this process has a mount namespace of its own."""
DISK = 64 << 20
"""Bytes of the disk; the largest job needs about a third."""
TIMEOUT = 120.0
"""Seconds after which a job that should end is called stuck."""
GRACE = 2.0
"""Seconds that other processes of a job get to notice that one is gone."""
SIGNALS = {
    "SIGKILL": signal.SIGKILL,
    "SIGTERM": signal.SIGTERM,
    "SIGINT": signal.SIGINT,
    "SIGHUP": signal.SIGHUP,
}
FULL, READ_ONLY = "full disk", "read-only folder"
IMPORTS = (
    *("accelerate", "diffusers", "efficientnet_lite_pytorch", "matplotlib.pyplot", "tyro"),
    *("dimr_fast.extraction", "dimr_fast.training", "dimr_fast.sampling", "dimr_fast.evaluation"),
)


@dataclass(frozen=True)
class Disturbance:
    """A disturbance of one attempt: after `begin`, for the time `length`, as fractions of the time
    of an undisturbed job. `rank` receives SIGKILL; other signals go to all processes."""

    kind: str
    begin: float
    length: float
    rank: int


def plan(seed: int, cycle: int, processes: int, kinds: list[str]) -> list[Disturbance]:
    """Draw the disturbances of a cycle."""
    draw = random.Random(f"{seed} {cycle}")
    return [
        Disturbance(kind, draw.uniform(0, 0.7), draw.uniform(0, 0.5), draw.randrange(processes))
        for kind in draw.sample(kinds, 4)
    ]


def use_own_mounts() -> str | None:
    """Start this script anew in a mount namespace of its own; return why that is impossible."""
    if OWN_MOUNTS in os.environ:
        return None
    command = ["unshare", "--mount", "--map-root-user"]
    probe = [*command, "mount", "-t", "tmpfs", "none", tempfile.gettempdir()]
    try:
        done = subprocess.run(probe, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    if done.returncode:
        return done.stderr.strip()
    os.environ[OWN_MOUNTS] = "1"
    os.execvp(command[0], [*command, sys.executable, *sys.argv])


@contextmanager
def full_disk(disk: Path, folder: Path) -> Iterator[None]:
    """Fill the disk."""
    filler = disk / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue
        yield
    finally:
        filler.unlink()


@contextmanager
def read_only_folder(disk: Path, folder: Path) -> Iterator[None]:
    """Make a folder read-only by a mount over it; files that are open for writing stay so."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


OF_THE_DISK = {FULL: full_disk, READ_ONLY: read_only_folder}


class Attempt:
    """A run of a job's command, in one process or several that are connected as by a launcher."""

    def __init__(self, words: list[str], processes: int, log: Path) -> None:
        self.begin = time.monotonic()
        fork = multiprocessing.get_context("fork")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes: list[BaseProcess] = []
        for rank in range(processes):
            ranks = {"RANK": rank, "LOCAL_RANK": rank}
            ranks |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            launch = ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {name: str(value) for name, value in launch.items()}
            arguments = (words, environment if processes > 1 else {}, log)
            self.processes.append(fork.Process(target=run_logged, args=arguments))
            self.processes[-1].start()

    def is_running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def wait_until(self, seconds: float) -> None:
        """Wait until this time after the start, or until a process has ended."""
        while self.is_running() and time.monotonic() < self.begin + seconds:
            time.sleep(0.002)

    def send(self, number: int, rank: int) -> None:
        """Send SIGKILL to one process, other signals to all."""
        for process in [self.processes[rank]] if number == signal.SIGKILL else self.processes:
            assert process.pid is not None
            if process.is_alive():
                os.kill(process.pid, number)

    def wait(self) -> int:
        """Wait for the end; return the status of rank 0. Raises TimeoutError for a stuck job."""
        deadline = time.monotonic() + TIMEOUT
        while self.is_running() and time.monotonic() < deadline:
            time.sleep(0.002)
        ended_early = any(process.exitcode for process in self.processes)
        if ended_early:
            # As a launcher does.
            deadline = min(deadline, time.monotonic() + GRACE)
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        stuck = any(process.is_alive() for process in self.processes)
        self.kill()
        if stuck and not ended_early:
            raise TimeoutError(f"still running {TIMEOUT:.0f} s after it should have ended")
        assert self.processes[0].exitcode is not None
        return self.processes[0].exitcode

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def run_command(words: list[str]) -> int:
    """Run a command of `dimr-fast` in this process; return its exit status."""
    from dimr_fast.cli import main_of_process

    return main_of_process(words)


def run_logged(words: list[str], environment: dict[str, str], log: Path) -> None:
    """Run a command as a new process of its own, with its output in the file `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    try:
        sys.exit(run_command(words))
    except KeyboardInterrupt:
        sys.exit(130)  # before or after the command
    except Exception:  # this process ends here, with its reason in the log
        traceback.print_exc()
        sys.exit(1)


class Soak:
    """Run cycles and count disturbances; `failures` describe the cycles that lost something."""

    def __init__(self, folder: Path, kinds: list[str], seed: int) -> None:
        from tests.support.soak_jobs import make_jobs

        self.kinds, self.seed = kinds, seed
        self.disk, self.log, self.failed = folder / "disk", folder / "log", folder / "failed"
        self.disk.mkdir()
        if FULL in kinds:
            options = ["-t", "tmpfs", "-o", f"size={DISK}"]
            subprocess.run(["mount", *options, "none", self.disk], check=True)
        self.output = self.disk / "output"
        self.jobs = make_jobs(folder / "inputs", self.output)
        self.counts = {job.name: collections.Counter[str]() for job in self.jobs}
        self.failures: list[str] = []
        self.expected: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.cycles = 0

    def run_undisturbed(self) -> None:
        """Run every job once here and once as it will be disturbed; keep its files and time."""
        from tests.support.soak_jobs import contents

        for job in self.jobs:
            if job.processes == 1:
                self._prepare()
                with self.log.open("w") as log, redirect_stdout(log), redirect_stderr(log):
                    run_command(job.command())
        for job in self.jobs:
            self._prepare()
            attempt = Attempt(job.command(), job.processes, self.log)
            if attempt.wait():
                raise RuntimeError(f"{job.name} failed undisturbed:\n{self.log.read_text()}")
            self.seconds[job.name] = time.monotonic() - attempt.begin
            self.expected[job.name] = contents(self.output)
            print(f"{job.name}: {self.seconds[job.name]:.1f} s undisturbed", flush=True)

    def run_cycle(self) -> None:
        """Disturb the next job, finish it, and compare its files."""
        job = self.jobs[self.cycles % len(self.jobs)]
        disturbances = plan(self.seed, self.cycles, job.processes, self.kinds)
        self._prepare()
        happened = []
        try:
            for disturbance in disturbances:
                if self._disturb(job, disturbance):
                    happened.append(disturbance.kind)
            problems = self._finish(job)
        except Exception as error:  # a damaged file may lead to any
            problems = [repr(error)]
        self.counts[job.name].update(happened)
        print(f"cycle {self.cycles}, {job.name}: {', '.join(happened)}", flush=True)
        if problems:
            self._report(disturbances, problems)
        self.cycles += 1

    def _prepare(self) -> None:
        from tests.support.soak_jobs import clear

        clear(self.disk)
        self.log.write_text("")

    def _disturb(self, job: Any, disturbance: Disturbance) -> bool:
        """Start the job and disturb it; return False if it ended before."""
        if job.is_finished():
            return False
        duration = self.seconds[job.name]
        attempt = Attempt(job.command(), job.processes, self.log)
        try:
            attempt.wait_until(disturbance.begin * duration)
            if not attempt.is_running():
                return False
            if disturbance.kind in SIGNALS:
                number = SIGNALS[disturbance.kind]
                attempt.send(number, disturbance.rank)
                status, allowed = attempt.wait(), {0, 128 + number, -number}
            else:
                with OF_THE_DISK[disturbance.kind](self.disk, self.output):
                    attempt.wait_until((disturbance.begin + disturbance.length) * duration)
                status, allowed = attempt.wait(), {0, 2}
        finally:
            attempt.kill()
        # Of several processes one may have ended first, and the others lost their connection.
        if job.processes == 1 and status not in allowed:
            raise RuntimeError(f"{disturbance.kind}: exit status {status}, expected {allowed}")
        return True

    def _finish(self, job: Any) -> list[str]:
        """Run the job to its end, undisturbed; return what it lost."""
        from tests.support.soak_jobs import contents, lost

        attempt = Attempt(job.command(), job.processes, self.log)
        status = attempt.wait()
        if status and not (status == 2 and job.is_finished()):
            return [f"exit status {status} after the last disturbance"]
        said = self.log.read_text()
        problems = lost(self.expected[job.name], contents(self.output), said)
        if job.processes == 1 and "Traceback" in said:
            problems.append("a traceback in its output")
        return problems

    def _report(self, disturbances: list[Disturbance], problems: list[str]) -> None:
        """Print and keep what is needed to understand a failure."""
        kept = self.failed / str(self.cycles)
        kept.mkdir(parents=True, exist_ok=True)
        if self.output.exists():
            shutil.copytree(self.output, kept / "output", dirs_exist_ok=True)
        shutil.copy(self.log, kept)
        self.failures.append(f"cycle {self.cycles}: {'; '.join(problems)}")
        print("LOST", self.failures[-1], *disturbances, f"see {kept}", sep="\n  ", flush=True)


def result(soak: Soak, minutes: float, skipped: str | None) -> dict[str, Any]:
    """Return the counts, with the seed and the machine."""
    from benchmarks.utils import machine

    kills = sum(counts[kind] for counts in soak.counts.values() for kind in SIGNALS)
    total = sum(sum(counts.values()) for counts in soak.counts.values())
    return {
        "machine": machine.description("dimr_fast", "kernels", "csrc", "tests"),
        "seed": soak.seed,
        "minutes": round(minutes, 1),
        "cycles": soak.cycles,
        "signals": kills,
        "disturbances": total,
        "skipped": skipped,
        "counts": {name: dict(sorted(counts.items())) for name, counts in soak.counts.items()},
        "seconds undisturbed": {name: round(s, 2) for name, s in soak.seconds.items()},
        "failures": soak.failures,
    }


def main() -> int:
    """Soak for some minutes; return 1 if a job has lost something."""
    parser = argparse.ArgumentParser(
        description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="time to spend (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="decides the disturbances")
    parser.add_argument("--out", type=Path, help="JSON file for the counts")
    given = parser.parse_args()
    begin = time.monotonic()
    why_not = use_own_mounts()
    skipped = None if why_not is None else f"{FULL}, {READ_ONLY}: no own mounts here ({why_not})"
    if skipped is not None:
        print(f"skipped: {skipped}")
    kinds = [*SIGNALS, *(() if skipped else OF_THE_DISK)]
    # Read when torch is imported; a process with threads cannot be forked safely.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"}
    for name in IMPORTS:
        importlib.import_module(name)
    # Its thread would not exist in forked processes, but might hold a lock.
    tqdm.tqdm.monitor_interval = 0
    folder = Path(tempfile.mkdtemp(prefix="dimr-fast-soak-"))
    soak = Soak(folder, kinds, given.seed)
    soak.run_undisturbed()
    while time.monotonic() < begin + 60 * given.minutes:
        soak.run_cycle()
    found = result(soak, (time.monotonic() - begin) / 60, skipped)
    print(json.dumps(found["counts"], indent=2))
    verdict = f"{len(soak.failures)} cycles lost something" if soak.failures else "nothing lost"
    print(f"{found['disturbances']} disturbances in {soak.cycles} cycles: {verdict}")
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=2) + "\n")
    if FULL in kinds:
        subprocess.run(["umount", soak.disk], check=True)
    if not soak.failures:
        shutil.rmtree(folder)
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
