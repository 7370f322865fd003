"""Tests of the tuner of launch configurations, and of its compilation ahead of time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import search_space
from benchmarks.gpu.tune import tune
from benchmarks.utils.files import ROOT
from dimr_fast.kernels import configuration
from tests.support.oracle import skip_module_without_triton

skip_module_without_triton()

CPU = torch.device("cpu")
DRAW = search_space.draw_on(CPU)
COMPILE = """
import json, multiprocessing
from benchmarks.gpu.compile_ahead import compile_all

def compiled(seconds):
    verdicts = compile_all(
        ["upsample_add_fwd"], gpu="none", capability=(9, 0), seconds=seconds
    )
    return [[*key, verdict] for key, verdict in verdicts.items()]

if __name__ == "__main__":
    found = [compiled(300), compiled(0.1)]
    assert not multiprocessing.active_children(), "compiling would go on beside the timing"
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_candidates_are_compiled_and_spills_reported(tmp_path: Path) -> None:
    """This uses all cores and needs no GPU."""
    script = tmp_path / "script.py"
    script.write_text(COMPILE)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    verdicts, hurried = json.loads(done.stdout.splitlines()[-1])
    (case,) = (
        case for case in search_space.cascades(DRAW, True) if case.kernel == "upsample_add_fwd"
    )
    candidates = {json.dumps(constants) for constants in case.candidates}
    assert {constants for _, _, constants, _ in verdicts} == candidates
    assert len(verdicts) == len({size for _, size, _, _ in verdicts}) * len(candidates)
    reasons = {verdict for *_, verdict in verdicts}
    assert all(reason.startswith("spills ") for reason in reasons - {""})
    assert "" in reasons
    compiled = list((tmp_path / "cache").rglob("*.cubin"))
    assert len(compiled) >= len(candidates)
    assert len(hurried) < len(verdicts), "as many as there is time for"


def test_a_candidate_that_spills_is_not_timed() -> None:
    case = next(search_space.gates(DRAW, True))
    default = dict(configuration.configuration(case.kernel, case.size, CPU))
    spilling, good = [c for c in case.candidates if c != default][:2]
    verdicts = {
        (case.kernel, case.size, json.dumps(c)): v
        for c, v in ((spilling, "spills 8 bytes"), (good, ""))
    }
    _, times = tune(case, verdicts=verdicts, time_call=lambda call: 1.0)
    assert json.dumps(spilling) not in times
    assert len(times) == len(case.candidates) - 1
    assert {json.dumps(default), json.dumps(good)} <= set(times)


def test_kernels_are_listed_under_their_operators() -> None:
    for cases, operators in search_space.CASES.items():
        assert all(case.kernel.startswith(operators) for case in cases(DRAW, True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the tuner itself is run")
def test_the_tuner_writes_every_kernel(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu.tune", "--dry-run", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    tuned = json.loads(out.read_text())
    default = json.loads(configuration.path("default").read_text())
    # The sum takes little time, and training on a GPU does not use fp32.
    not_tuned = {"sum_partials", *(kernel for kernel in default if kernel.endswith("_fp32"))}
    assert set(tuned) | not_tuned == set(default)
    for kernel, by_size in tuned.items():
        constants = next(iter(default[kernel].values()))
        assert all(set(found) == set(constants) for found in by_size.values())
