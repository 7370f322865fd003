"""Tests of the tables and plots of the whole model's benchmark, on invented results."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.model import scaling
from benchmarks.report.cpu_targets import speedup
from benchmarks.report.model import model_table, sample_accuracy_text, target_table
from benchmarks.report.plots import draw_roofline, draw_scaling, draw_speedups
from benchmarks.report.results import Group, ModelResults
from benchmarks.utils.names import (
    OURS,
    PUBLISHED,
    PUBLISHED_COMPILED,
    PUBLISHED_NO_CHECKPOINTING,
)
from benchmarks.utils.spread import Spread
from benchmarks.utils.targets import Target


def entry(provider: str, times: list[float], **info: Any) -> dict[str, Any]:
    facts = {
        "implementation": provider,
        "preset": "XL/2R",
        "pass": "forward",
        "batch": 1,
        "dtype": "bfloat16",
        "device": "CPU",
        "threads": 2,
        "torch": "2.13.0",
        "flops": 300e9,
        "bytes": 2e9,
        "gemm_tflops": 0.5,
        "gemm_tflops_p20": 0.4,
        "gemm_tflops_p80": 0.6,
        "copy_gbps": 20.0,
    }
    return {"extra_info": facts | info, "stats": {"data": times}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    training = {"preset": "demo-size", "pass": "training step", "batch": 64}
    rows = [
        entry(PUBLISHED, [2.0, 3.0, 4.0]),
        entry(OURS, [1.0, 1.0, 1.0]),
        entry(PUBLISHED, [7.0], dtype="float32"),
        entry(PUBLISHED_NO_CHECKPOINTING, [2.0], **training),
        entry(PUBLISHED_COMPILED, [1.4], **training),
        entry(OURS, [1.0], **training),
    ]
    for row in rows[3:]:
        del row["extra_info"]["bytes"]
    content = {
        "machine_info": {"cpu": {"brand_raw": "Some CPU"}},
        "commit_info": {"id": "0123456789abcdef"},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": rows,
    }
    target = tmp_path / "model_cpu.json"
    target.write_text(json.dumps(content))
    return target


def test_a_ratio_spans_the_extremes_that_both_spreads_allow() -> None:
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 1.8, 4.2)
    ratio = Spread(4.0, 3.0, 6.0) / Spread(2.0, 1.5, 3.0)
    assert ratio == Spread(2.0, 1.0, 4.0)
    assert str(ratio) == "2.00 (1.00–4.00)"


def test_tables_state_the_values_of_the_file(path: Path) -> None:
    found = ModelResults.read(path)
    assert found.on_cpu
    table = model_table(found)
    assert "Some CPU, 2 threads, torch 2.13.0, commit 012345678, 2026-01-02" in table
    (line,) = [row for row in table.splitlines() if row.startswith("| XL/2R")]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[4:7] == ["1,000 (1,000–1,000)", "1.00", "0.30"]
    assert cells[7] == "60.0"  # 0.3 of 0.5 TFLOP/s
    assert cells[8] == "3.00 (2.40–3.60)"
    verdicts = {
        row.split("|")[1].strip(): row.split("|")[-2].strip()
        for row in target_table(found).splitlines()
    }
    assert verdicts["XL/2R, bf16, against published bf16 autocast"] == "met"
    assert verdicts["XL/2R, bf16, against published fp32"] == "met"
    assert verdicts["XL/2R, share of the bf16 linear rate"] == "aim met"
    assert verdicts["demo-size training against published without checkpointing"] == "missed"
    assert verdicts["demo-size training against torch.compile of it"] == "missed"


def test_a_target_without_rows_is_not_measured(path: Path) -> None:
    found = ModelResults.read(path)
    group = Group("G/2R", "forward", 1, "bfloat16")
    assert Target("", 1, 2, speedup(group, PUBLISHED)).judge(found).verdict == "not measured"


def test_a_file_without_rows_is_refused(path: Path) -> None:
    content = json.loads(path.read_text()) | {"benchmarks": []}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="without benchmarks"):
        ModelResults.read(path)


def test_plots_are_drawn(path: Path, tmp_path: Path) -> None:
    found = ModelResults.read(path)
    draw_speedups(found, tmp_path / "speedups.png")
    draw_roofline(found, tmp_path / "roofline.png")
    fit = scaling.fit([1, 2, 4], [1.0, 2.0, 4.0])
    axes = {"batch": {"forward": fit, "training step": fit}}
    draw_scaling({"axes": axes, "dtype": "bf16", "device": "CPU"}, tmp_path / "scaling.png")
    for name in ("speedups", "roofline", "scaling"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_fit_recovers_a_power() -> None:
    found = scaling.fit([1, 3, 10], [5.0, 5.0 * 3**1.5, 5.0 * 10**1.5])
    assert found["exponent"] == pytest.approx(1.5)
    assert found["factor"] == pytest.approx(5.0)


def test_deeper_and_larger_configurations() -> None:
    demo = scaling.PRESETS["demo"]
    assert scaling.larger(demo, 64).image_size == (64, 64)
    twice = scaling.deeper(demo, 2)
    assert [b.num_blocks // 2 * 2 + 1 for b in twice.stage_configs] == [11, 7, 7]


def test_precisions_that_are_too_inaccurate_are_named() -> None:
    def text(**medians: float) -> str:
        psnr = {name: {"median": db} for name, db in medians.items()}
        facts = {"device": "CPU", "threads": 1, "torch": "2", "commit": "0", "date": "2026-01-01"}
        return sample_accuracy_text(
            facts | {"count": 96, "steps": 25, "required_db": 45.0, "psnr_db": psnr}
        )

    assert "must be 45 dB or more. Below that: fp8." in text(bf16=40.0, int8=45.0, fp8=44.9)
    assert "Below" not in text(bf16=40.0, int8=45.0, fp8=45.0)
