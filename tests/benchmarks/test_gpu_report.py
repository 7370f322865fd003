"""The GPU report: its verdicts and tables on invented numbers."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import compare, render, targets
from benchmarks.ops import bench_depthwise_conv2d
from dimr_fast.ops import OPERATORS


def row(implementation: str, milliseconds: float, **facts: Any) -> dict[str, Any]:
    found = {"implementation": implementation, "median ms": milliseconds, "dtype": "bfloat16"}
    return found | facts


def synthetic() -> dict[str, Any]:
    """Return rows as a GPU would produce them, with invented times."""
    xl: dict[str, Any] = {"preset": "XL/2R", "batch": 64, "pass": "forward"}
    g = xl | {"preset": "G/2R"}
    one = xl | {"batch": 1}
    training = xl | {"pass": "training step"}
    norm: dict[str, Any] = {"operator": "td_rms_norm", "pass": "forward"}
    chain = {"operator": "depthwise_conv2d", "pass": "chain", "x": "64×32×32×480"}
    attention = {"operator": "attention", "pass": "forward", "x": "64×257×2880"}
    upsample = {"operator": "upsample_add", "pass": "forward", "x": "32×32×32×480"}
    model = [
        row("published", 400, **xl),
        row("ours", 100, **xl, **{"TFLOP/s": 500.0}),
        row("published", 600, **g),
        row("ours", 200, **g, **{"TFLOP/s": 480.0}),
        row("published, compiled", 149, **xl),
        row("published", 90, **one),
        row("published", 1, **xl) | {"preset": "demo"},
        row("ours", 1, **xl) | {"preset": "demo"},
        row("ours", 10, **one),
        row("ours", 300, **training, **{"peak GB": 61.0}),
        # No row of ours has this dtype.
        row("published", 1, **training) | {"dtype": "float32"},
    ]
    operators = [
        row("triton", 1, **norm, **{"GB/s": 2700.0}),
        row("triton", 1, **norm, **{"GB/s": 2850.0}),
        row("cuda", 1, **chain),
        row("reference", 2.5, **chain),
        row("triton", 1, **attention),
        row("triton", 1, **upsample),
        row("reference", 3.6, **upsample) | {"x": "another"},
    ]
    published = {"backend": "published", "x": "64×257×2880", "pass": "forward", "median ms": 4.0}
    ceilings = [
        {"case": "copy", "median ms": 1.0, "GB/s": 3000.0},
        {"case": "M=8192 N=8192 K=8192", "TFLOP/s": 800.0, "GB/s": 1.0},
    ]
    tables = {
        "measure": {"ceilings": ceilings, "SDPA": [published]},
        "model": {"benchmarks": model},
        "operators": {"benchmarks": operators},
    }
    return {
        "date": "2000-01-01T00:00:00+00:00",
        "minutes": 9,
        "dry_run": False,
        "sections": {
            name: {"status": "passed", "seconds": 1.0, "tables": t} for name, t in tables.items()
        },
    }


def test_targets_are_judged_by_their_worst_row() -> None:
    results = synthetic()
    judged = {r["target"]: (r["verdict"], r["measured"]) for r in targets.judge(results)}
    measured = {target: answer for target, answer in judged.items() if answer[1] is not None}
    assert measured == {
        "sampling, batch ≥ 64, against published eager": ("met", 3.0),
        "… against torch.compile of it": ("missed", 1.49),
        "sampling, batch 1, against published eager": ("met", 9.0),
        "sampling, batch ≥ 64, share of the GEMM rate": ("met", pytest.approx(60)),
        "training peak memory, XL/2R, batch 64": ("missed", 61.0),
        "norm kernels, share of copy bandwidth": ("met", pytest.approx(90)),
        "attention with casts and pads, against published": ("met", 4.0),
        "depthwise + residual + norm against cuDNN + add + norm": ("met", 2.5),
    }
    others = {verdict for verdict, value in judged.values() if value is None}
    assert others == {"not measured"}
    for aim, verdict in ((40.0, "aim met"), (60.0, "met"), (60.1, "missed")):
        rows = results["sections"]["model"]["tables"]["benchmarks"]
        next(r for r in rows if "peak GB" in r)["peak GB"] = aim
        verdicts = {r["target"]: r["verdict"] for r in targets.judge(results)}
        assert verdicts["training peak memory, XL/2R, batch 64"] == verdict
    results["dry_run"] = True
    assert {r["verdict"] for r in targets.judge(results)} == {"not measured"}


def test_targets_name_existing_operators_and_passes() -> None:
    """Operators, passes and implementations exist in the operators' benchmarks."""
    assert "chain" in bench_depthwise_conv2d.GRADIENT_OF
    for operator, implementation in (
        ("depthwise_conv2d", "cuda"),
        ("upsample_add", "triton"),
        ("attention", "triton"),
        ("td_rms_norm", "triton"),
    ):
        assert implementation in OPERATORS[operator].names


def test_the_report_has_its_tables_in_order(tmp_path: Path) -> None:
    results = synthetic()
    results["sections"]["measure"]["notes"] = ["a note"]
    results["sections"]["plots"] = {
        "status": "passed",
        "tables": {"plots": [{"file": "model.png"}]},
    }
    render.render(results, tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "| training peak memory, XL/2R, batch 64 | ≤ 60 GB | 40 GB | 61 | 1 | missed |" in report
    assert "| case | median ms | GB/s | TFLOP/s |" in report
    assert "| M=8192 N=8192 K=8192 |  | 1 | 800 |" in report
    assert "- a note" in report
    assert "![model.png](model.png)" in report
    order = [report.index(f"\n## {name}\n") for name in ("Targets", "Sections", "measure", "plots")]
    assert order == sorted(order)
    assert not list(tmp_path.glob(".*")), "nothing unfinished is left"


def test_predicted_times_are_compared_with_measured_ones(tmp_path: Path) -> None:
    results = synthetic()
    norm = {"operator": "td_rms_norm", "x": "64×257×960", "dtype": "bfloat16"}
    results["sections"]["operators"]["tables"]["benchmarks"] = [
        row("triton", 0.03, **norm) | {"pass": "forward"},
        row("cuda", 0.02, **norm) | {"pass": "forward"},
        row("reference", 0.001, **norm) | {"pass": "forward"},
        row("triton", 0.001, **norm) | {"pass": "forward", "dtype": "float32"},
        row("triton", 0.1, **norm) | {"pass": "forward + backward"},
    ]
    file = tmp_path / "predictions.json"
    assert compare.compare(results, file) == []
    predicted = {"operator": "td_rms_norm", "x": "64x257x960", "floor us": 5.0}
    rows = [
        predicted | {"kernel": "fwd", "pass": "Forward", "predicted us": 10.0, "registers": 40},
        predicted | {"kernel": "sum", "pass": "backward", "predicted µs": 15.0},
        predicted | {"kernel": "bwd", "pass": "backward", "predicted µs": 25.0},
        predicted | {"kernel": "fwd", "pass": "forward", "x": [1, 2], "predicted us": 1.0},
    ]
    for written in (rows, {"gpu": "any", "rows": rows}):
        file.write_text(json.dumps(written))
        found = compare.compare(results, file)
        assert [(r["x"], r["pass"], r["kernel"]) for r in found] == [
            ("64×257×960", "forward", "fwd"),
            ("64×257×960", "backward", "sum + bwd"),
            ("1×2", "forward", "fwd"),
        ]
        assert [(r["floor µs"], r["predicted µs"]) for r in found] == [(5, 10), (10, 40), (5, 1)]
        times = [(r["measured µs"], r["measured / predicted"]) for r in found]
        assert times == [pytest.approx((20, 2)), pytest.approx((80, 2)), (None, None)]
