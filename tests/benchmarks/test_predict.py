"""Tests of predicted kernel times: the committed ones, and the model behind them."""

import importlib.util
import inspect
import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton

from benchmarks.gpu import predict
from benchmarks.gpu.launch_cases import LaunchCase, Work, cases, run_in_sequence
from tests.support.aot import compiled

COMMITTED = json.loads(predict.RESULT.read_text())
KERNEL = {
    "kernel": "copy",
    "registers": 32,
    "shared": 0,
    "warps": 4,
    "opcodes": {"LDG.E.128": 2, "STG.E.128": 1, "FADD": 20, "BRA": 1},
    "loops": [],
}
LOOP = KERNEL | {"loops": [{"LDG.E.128": 1, "FADD": 10, "BRA": 1}]}


def test_case_names_and_rows_are_unique() -> None:
    assert importlib.util.find_spec(predict.COMPILER)
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)
    keys = [(row["operator"], row["x"], row["pass"]) for row in COMMITTED["rows"]]
    # Several kernels of a pass are "parts"; a benchmark times the row of their sum.
    keys = [key for key in keys if not key[2].endswith("part")]
    assert len(set(keys)) == len(keys)


def test_every_case_has_a_committed_prediction() -> None:
    """After a new case: `python -m benchmarks.gpu.predict`."""
    committed = {(row["operator"], row["x"]) for row in COMMITTED["rows"]}
    assert {(case.operator, "×".join(map(str, case.x))) for case in cases()} <= committed


def launcher_calls(call: Any) -> Iterator[Any]:
    """Yield the partial calls of launchers in a case's call."""
    if call.func is run_in_sequence:
        for part in call.args:
            yield from launcher_calls(part)
    else:
        yield call


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_call_has_the_arguments_of_its_launcher(case: LaunchCase) -> None:
    """Compiling all cases takes minutes; a launcher whose arguments change shows here."""
    for call in launcher_calls(case.call):
        inspect.signature(call.func).bind(*call.args, **call.keywords)


def _compiled_again() -> list[LaunchCase]:
    return [
        case
        for case in cases()
        if (case.operator, case.x[0], case.x[-1])
        in {("td_rms_norm", 64, 960), ("gated_gelu", 64, 1920)}
    ]


def aot_launches() -> list[LaunchCase]:
    return _compiled_again()


@pytest.mark.slow
@pytest.mark.skipif(
    COMMITTED["triton"] != triton.__version__,
    reason=f"the predictions are of Triton {COMMITTED['triton']}",
)
def test_kernels_still_compile_to_what_was_committed() -> None:
    committed = {
        (row["operator"], row["x"], row["pass"].removesuffix(", part"), row["kernel"]): row
        for row in COMMITTED["rows"]
    }
    checked = 0
    for case in _compiled_again():
        for kernel in compiled("tests.benchmarks.test_predict"):
            if kernel.launch == case.name and kernel.configurations == "default":
                x = "×".join(map(str, case.x))
                row = committed[case.operator, x, case.direction, kernel.kernel]
                assert row["registers"] == kernel.registers, "run python -m benchmarks.gpu.predict"
                assert (row["shared"], row["warps"]) == (kernel.shared, kernel.warps)
                assert [row["programs"]] == kernel.grids
                checked += 1
    assert checked >= 6


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({}, 16),  # warps: 64 / 4, and registers: 65536 / (128 · 32)
        ({"registers": 33}, 12),  # 40 are allocated
        ({"registers": 255, "warps": 8}, 1),
        ({"shared": 75 * 1024}, 2),
        ({"warps": 1, "registers": 16}, 32),
    ],
)
def test_how_many_programs_a_multiprocessor_runs(changes: dict[str, Any], blocks: int) -> None:
    assert predict.resident(KERNEL | changes) == blocks


def test_each_resource_can_be_the_limit() -> None:
    def why(work: Work, programs: int = 100_000, kernel: dict[str, Any] = KERNEL) -> str:
        return predict.predict(kernel, programs, work)["why"].partition(":")[0]

    assert why(Work(1e9)) == "memory"
    assert why(Work(1e8, cached=1e10)) == "L2"
    assert why(Work(1e6, flops=1e12)) == "products"
    assert why(Work(1e6, [100]), kernel=LOOP) == "latency"
    many = KERNEL | {"opcodes": {"FADD": 10_000}}
    assert why(Work(1e6), kernel=many) == "instructions"
    special = KERNEL | {"opcodes": {"MUFU.EX2": 1_000}}
    assert why(Work(1e6), kernel=special) == "special functions"


def test_the_time_of_a_copy_follows_from_its_bytes() -> None:
    found = predict.predict(KERNEL, 100_000, Work(3e9))
    assert found["floor us"] == 1000
    assert 1000 < found["predicted us"] < 1010


def test_data_larger_than_the_cache_is_read_again_from_memory() -> None:
    def time(reread: float) -> float:
        found = predict.predict(KERNEL, 100_000, Work(3e9, reread=3e9, reread_per_program=reread))
        return float(found["predicted us"])

    assert time(1e3) == pytest.approx(1093, rel=0.01)
    assert time(1e3) < time(2e4) < time(1e6)
    assert time(1e6) == pytest.approx(2000, rel=0.02)


def test_asynchronous_copies_hide_latency() -> None:
    copies = LOOP | {"loops": [{"LDGSTS.E.128": 1, "FADD": 10, "BRA": 1}]}
    plain, ahead = (
        predict.predict(k, 500, Work(1e6, [100]))["predicted us"] for k in (LOOP, copies)
    )
    assert ahead < plain / 5


def test_a_wrong_number_of_loops_is_an_error() -> None:
    with pytest.raises(ValueError, match="got 2 for copy, expected 1"):
        predict.predict(LOOP, 10, Work(1e6, [1, 2]))
