"""The example files of the documentation: read by the programs that they are for."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

EXAMPLES = ROOT / "docs" / "examples"
SCRIPTS = sorted(EXAMPLES.glob("slurm-*.sh"))
OPTION = re.compile(r"#SBATCH --([a-z-]+)(?:=(\S+))?")
VALUES = {
    "job-name": r"[\w-]+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "time": r"\d+:\d\d:\d\d",
    "signal": r"[A-Z]+@\d+",
    "open-mode": r"append|truncate",
    "output": r"\S+",
    "requeue": None,
}
"""Options of sbatch, from its manual, with the form of their value; None takes none."""


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_slurm_script_has_known_options_before_its_first_command(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    lines = path.read_text().splitlines()
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert options == [line for line in lines[:first] if line.startswith("#SBATCH")]
    assert len(options) >= 5
    for option in options:
        match = OPTION.fullmatch(option)
        assert match is not None, option
        form = VALUES[match[1]]
        assert match[2] is None if form is None else re.fullmatch(form, match[2] or ""), option


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_sbatch_reads_the_options(path: Path, tmp_path: Path) -> None:
    """Without a controller it gets as far as the connection, after the options."""
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        pytest.skip("needs sbatch (Debian: slurm-client)")

    def errors(text: str) -> str:
        script, settings = tmp_path / "script.sh", tmp_path / "slurm.conf"
        script.write_text(text)
        settings.write_text(
            "ClusterName=test\nSlurmctldHost=localhost\nSlurmctldPort=9\nNodeName=n1\n"
            "AuthType=auth/none\nCredType=cred/none\nGresTypes=gpu\nMessageTimeout=2\n"
            "PartitionName=p Nodes=n1\n"
        )
        words = [str(sbatch), "--test-only", str(script), "out"]
        environment = {"SLURM_CONF": str(settings), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        return done.stderr

    assert "Unable to contact slurm controller" in errors(path.read_text())
    assert "unrecognized option" in errors(path.read_text().replace("--nodes", "--nodez"))
    assert "Invalid --time" in errors(re.sub(r"--time=\S+", "--time=soon", path.read_text()))


def run_slurm_script(
    path: Path, folder: Path, *words: str, status: int = 0, restarts: int = 0
) -> list[str]:
    """Run a script with programs that stand for Slurm's; return the words that torchrun gets.

    `status` is the exit status of torchrun. What the script requeues is in the file `requeued`.
    """
    for name, text in {
        "scontrol": f'if [ "$1" = requeue ]; then echo "$2" >> {folder}/requeued; fi\n'
        "echo host-a; echo host-b",
        "srun": 'shift; exec "$@"',
        "torchrun": 'if [ "$1" = --help ]; then echo --shutdown-timeout; exit; fi\n'
        f'printf "%s\\n" "$@"; exit {status}',
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}:/usr/bin:/bin",
        "SLURM_JOB_NODELIST": "host-[a-b]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "17",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    done = subprocess.run(
        ["bash", str(path), *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["slurm-train.sh", "slurm-sample.sh"])
def test_a_script_that_fails_is_queued_again_a_few_times(tmp_path: Path, name: str) -> None:
    """The run ends before Slurm notices a lost node, and then Slurm does not queue it again."""
    run, requeued = tmp_path / "run", tmp_path / "requeued"
    run.mkdir()
    (run / "checkpoint.safetensors").touch()
    run_slurm_script(EXAMPLES / name, tmp_path, str(run))
    run_slurm_script(EXAMPLES / name, tmp_path, str(run), status=1, restarts=5)
    assert not requeued.exists()
    run_slurm_script(EXAMPLES / name, tmp_path, str(run), status=1, restarts=4)
    assert requeued.read_text() == "17\n"


def test_the_script_for_training_resumes_where_there_is_a_checkpoint(tmp_path: Path) -> None:
    path, run = EXAMPLES / "slurm-train.sh", tmp_path / "run"
    words = run_slurm_script(path, tmp_path, str(run), "--config", "imagenet256_xl2r")
    assert words[words.index("--rdzv-endpoint") + 1] == "host-a:29500"
    assert words[words.index("-m") + 1 :] == [
        *("dimr_fast.training", "--output", str(run), "--config", "imagenet256_xl2r")
    ]
    run.mkdir()
    (run / "checkpoint.safetensors").touch()
    again = run_slurm_script(path, tmp_path, str(run), "--config", "imagenet256_xl2r")
    assert again == [*words, "--resume"]


def test_the_script_for_sampling_passes_the_command(tmp_path: Path) -> None:
    command = ["sample", "--output", "my samples", "--count", "50000"]
    words = run_slurm_script(EXAMPLES / "slurm-sample.sh", tmp_path, *command)
    assert words[words.index("-m") + 1 :] == ["dimr_fast", *command]


def test_accelerate_reads_its_file() -> None:
    config = pytest.importorskip(
        "accelerate.commands.config.config_args", reason="needs accelerate"
    )
    found = config.load_config_from_file(str(EXAMPLES / "accelerate.yaml"))
    assert (found.num_machines, found.num_processes) == (2, 16)
    assert found.distributed_type == "MULTI_GPU"
    assert (found.main_process_ip, found.main_process_port) == ("10.0.0.1", 29500)
    assert found.mixed_precision == "no"  # the run's own setting decides
