"""Launch configurations: the files, what is looked up in them, and the tuner that writes them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tune
from oracle import skip_module_without_triton

from dimr_fast.kernels import configuration

skip_module_without_triton()

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def test_sizes_take_the_smallest_bucket_that_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"k": {256: {"ROWS": 8}, 1024: {"ROWS": 2}}}
    monkeypatch.setattr(configuration, "_table", lambda gpu: table)
    sizes = {1: 8, 256: 8, 257: 2, 1024: 2, 10**6: 2}
    assert {s: configuration.configuration("k", s, CPU)["ROWS"] for s in sizes} == sizes


def test_a_gpus_file_comes_before_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, size, rows in (("default", 64, 1), ("Fast_GPU_80", 16, 2)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"k": {str(size): {"ROWS": rows}}}))
    monkeypatch.setattr(configuration, "FOLDER", tmp_path)
    configuration._table.cache_clear()
    try:
        for gpu, rows in (("Fast GPU/80", 2), ("another", 1)):
            monkeypatch.setattr(configuration, "gpu_name", lambda device, gpu=gpu: gpu)
            assert configuration.configuration("k", 8, CPU)["ROWS"] == rows
            assert configuration.configuration("k", 32, CPU)["ROWS"] == 1
            assert configuration.configuration("k", 128, CPU)["ROWS"] == 1
    finally:
        configuration._table.cache_clear()


def test_a_trial_ends() -> None:
    before = dict(configuration.configuration("sum_partials", 8, CPU))
    with configuration.trial("sum_partials", {"BLOCK": 3}, CPU):
        assert configuration.configuration("sum_partials", 8, CPU) == {"BLOCK": 3}
    assert configuration.configuration("sum_partials", 8, CPU) == before


def test_files_name_kernels_that_there_are() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    default = json.loads(configuration.path("default").read_text())
    assert set(re.findall(r'configuration\(\s*"(\w+)"', sources)) <= set(default)
    for file in configuration.FOLDER.glob("*.json"):
        table = json.loads(file.read_text())
        for kernel, by_size in table.items():
            assert f'"{kernel.removesuffix("_fp32")}"' in sources
            sizes = [int(size) for size in by_size]
            assert sizes == sorted(sizes)
            assert all("num_warps" in constants for constants in by_size.values())


COMPILE = """
import json, multiprocessing, sys
sys.path.insert(0, sys.argv[1])
import gpu_compile

def compiled(seconds):
    verdicts = gpu_compile.compile_all(
        ["upsample_add_fwd"], gpu="none", capability=(9, 0), seconds=seconds
    )
    return [[*key, verdict] for key, verdict in verdicts.items()]

if __name__ == "__main__":
    found = [compiled(300), compiled(0.1)]
    assert not multiprocessing.active_children(), "compiling would go on beside the timing"
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_candidates_are_compiled_ahead_and_those_that_spill_are_known(tmp_path: Path) -> None:
    """On all cores and without a GPU."""
    script = tmp_path / "script.py"
    script.write_text(COMPILE)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, str(script), str(ROOT / "benchmarks")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    verdicts, hurried = json.loads(done.stdout.splitlines()[-1])
    (case,) = (case for case in tune.cascades(True) if case.kernel == "upsample_add_fwd")
    candidates = {json.dumps(constants) for constants in case.candidates}
    assert {constants for _, _, constants, _ in verdicts} == candidates
    assert len(verdicts) == len({size for _, size, _, _ in verdicts}) * len(candidates)
    reasons = {verdict for *_, verdict in verdicts}
    assert all(reason.startswith("spills ") for reason in reasons - {""})
    assert "" in reasons
    compiled = list((tmp_path / "cache").rglob("*.cubin"))
    assert len(compiled) >= len(candidates)
    assert len(hurried) < len(verdicts), "as many as there is time for"


def test_a_candidate_that_spills_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(tune.gates(True))
    default = dict(configuration.configuration(case.kernel, case.size, CPU))
    spilling, good = [c for c in case.candidates if c != default][:2]
    verdicts = {
        (case.kernel, case.size, json.dumps(c)): v
        for c, v in ((spilling, "spills 8 bytes"), (good, ""))
    }
    monkeypatch.setattr(tune, "_milliseconds", lambda call, dry_run: 1.0)
    _, times = tune.tune(case, dry_run=False, verdicts=verdicts)
    assert json.dumps(spilling) not in times
    assert len(times) == len(case.candidates) - 1
    assert {json.dumps(default), json.dumps(good)} <= set(times)


def test_kernels_are_found_under_their_operators() -> None:
    for cases, operators in tune.CASES.items():
        assert all(case.kernel.startswith(operators) for case in cases(True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the tuner itself is run")
def test_the_tuner_writes_a_file_that_is_found(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "tune.py"), "--dry-run", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    tuned = json.loads(out.read_text())
    default = json.loads(configuration.path("default").read_text())
    # A sum too small to matter; fp32, which nobody trains in on a GPU.
    left_alone = {"sum_partials", *(kernel for kernel in default if kernel.endswith("_fp32"))}
    assert set(tuned) | left_alone == set(default)
    for kernel, by_size in tuned.items():
        constants = next(iter(default[kernel].values()))
        assert all(set(found) == set(constants) for found in by_size.values())
