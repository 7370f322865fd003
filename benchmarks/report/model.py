"""Tables of the whole model's benchmark.

Figures are medians with 20th and 80th percentiles; the percentiles of a ratio are the smallest and
largest values that those of its two times allow.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.report.cpu_targets import TARGETS
from benchmarks.report.results import Entry, Group, ModelResults
from benchmarks.utils import machine
from benchmarks.utils.markdown import table
from benchmarks.utils.names import (
    BF16,
    FORWARD,
    FP8_PROVIDERS,
    FP32,
    OURS,
    OURS_INT8,
    PROVIDERS,
    PUBLISHED,
    PUBLISHED_COMPILED,
    REFERENCE_COMPILED,
    TRAINING,
)
from benchmarks.utils.spread import figure

README_GROUPS = (
    Group("XL/2R", FORWARD, 1, BF16),
    Group("XL/2R", FORWARD, 4, BF16),
    Group("demo", FORWARD, 1, BF16),
    Group("demo", FORWARD, 32, BF16),
    Group("demo", FORWARD, 32, FP32),
    Group("demo-size", TRAINING, 64, BF16),
)
"""The README's six rows: large and small models, both dtypes, sampling and training, and the row
in which we are slowest."""
README_PROVIDERS = (PUBLISHED, PUBLISHED_COMPILED, REFERENCE_COMPILED)
"""Those that the README compares with ours; the compiled ones sample with frozen weights."""


def model_table(results: ModelResults) -> str:
    """Return our rate in each group, and our speedup over each other provider."""
    groups = results.groups()
    others = [
        p
        for p in (*PROVIDERS, *FP8_PROVIDERS)
        if p != OURS and any(p in found for found in groups.values())
    ]
    rows = []
    for group, found in groups.items():
        ours = found.get(OURS)
        if ours is None:
            continue
        row = _group_columns(group) | {
            "ms": ours.seconds.scaled(1e3),
            "images/s": figure(group.batch / ours.seconds.median),
            "TFLOP/s": figure(ours.tflops.median),
            "of GEMM rate, %": figure(ours.gemm_share.median),
        }
        row |= _speedups(found, others)
        if not results.on_cpu:
            row["peak GB"] = figure(1e-9 * ours.info["peak_bytes"])
        rows.append(row)
    return (
        f"Our time on {results.machine}, and its speedup (×) over each other provider in the same "
        f"run: medians, with 20th and 80th percentiles in brackets.\n\n{table(rows)}"
    )


def _group_columns(group: Group) -> dict[str, Any]:
    return {
        "preset": group.preset,
        "pass": group.title,
        "batch": group.batch,
        "dtype": group.dtype,
    }


def _speedups(found: Mapping[str, Entry], others: list[str]) -> dict[str, Any]:
    ours = found[OURS].seconds
    return {f"× {p}": found[p].seconds / ours if p in found else None for p in others}


def readme_table(results: ModelResults, cost: str) -> str:
    """Return the README's table of speedups; a value below 1 means that we are slower.

    `cost` is a sentence on what an image costs.
    """
    groups = results.groups()
    rows = []
    for group in README_GROUPS:
        found = groups[group]
        ours = found[OURS].seconds
        row = _group_columns(group) | {"images/s": figure(group.batch / ours.median)}
        int8 = found.get(OURS_INT8)
        row["images/s, int8"] = int8 and figure(group.batch / int8.seconds.median)
        for provider in README_PROVIDERS:
            ratio = found[provider].seconds / ours if provider in found else None
            row[f"× {provider}"] = ratio and figure(ratio.median)
        rows.append(row)
    return (
        f"On {results.machine}: images per second, and the speedup (×) over other ways to run the "
        "same model in the same run. Below 1.00 the other way is faster; – was not measured. "
        f"{cost}\n\n{table(rows)}"
    )


def target_table(results: ModelResults) -> str:
    """Return each target for a CPU with its prediction, its measured value and the verdict."""
    rows = []
    for judgement in (target.judge(results) for target in TARGETS):
        target, worst = judgement.target, judgement.worst
        predicted = target.predicted
        rows.append(
            {
                "target": target.title,
                "required": target.required(),
                "aim": target.desired(),
                "predicted": None if predicted is None else f"{predicted:g}{target.unit}",
                "measured": worst and f"{worst}{target.unit}",
                "verdict": judgement.verdict,
            }
        )
    return table(rows)


def scaling_text(report: Mapping[str, Any]) -> str:
    """Return the fitted exponents of `results/scaling.json` as a sentence."""
    found = []
    for axis, fits in report["axes"].items():
        exponents = [f"{title} {fit['exponent']:.2f}" for title, fit in fits.items()]
        found.append(f"{axis} {', '.join(exponents)}")
    return (
        f"Time of a model like the demo's as a power of its size ({machine.summary(report)}, "
        f"{report['dtype']}). Fitted exponents: {'; '.join(found)}."
    )


def sample_accuracy_text(report: Mapping[str, Any]) -> str:
    """Return the table of `results/sample_accuracy.json`."""
    distances = report.get("frechet", {})
    rows = [
        {"precision": precision}
        | {f"{name}, dB": f"{db:.1f}" for name, db in found.items()}
        | {"Fréchet distance": f"{distances[precision]:.2f}" if precision in distances else None}
        for precision, found in report["psnr_db"].items()
    ]
    scored = (
        f" The Fréchet distance on {report['frechet_recipe']} is that of "
        f"{report['frechet_count']} samples to the held-out tiles."
        if distances
        else ""
    )
    below = [
        precision
        for precision, found in report["psnr_db"].items()
        if precision != "bf16" and found["median"] < report["required_db"]
    ]
    verdict = f" Below that: {', '.join(below)}." if below else ""
    return (
        f"PSNR against fp32 of {report['count']} samples of the demo's model, drawn in "
        f"{report['steps']} steps from the same noise ({machine.summary(report)}); the median of a "
        f"quantised format must be {report['required_db']:g} dB or more.{verdict}{scored}\n\n"
        f"{table(rows)}"
    )
