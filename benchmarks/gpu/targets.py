"""State the targets for a GPU, and judge a report by them.

The rows are those of `model/bench_model.py`, of the operators' benchmarks and of `ceilings.py`, all
of one run on one machine.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.utils.names import (
    BF16,
    FORWARD,
    OURS,
    OURS_FP8,
    PUBLISHED,
    PUBLISHED_COMPILED,
    REFERENCE_COMPILED,
    TORCHAO_FP8,
    TRAINING,
)
from benchmarks.utils.spread import Spread
from benchmarks.utils.targets import Target

DEMO = "demo"
"""Preset that no target is about."""
BATCH_1, LARGE_BATCHES, ANY_BATCH = range(1, 2), range(64, 2**30), range(1, 2**30)

Row = Mapping[str, Any]
Sections = Mapping[str, Mapping[str, Any]]
Measure = Callable[[Sections], Iterator[Spread]]


def find_rows(sections: Sections, names: Sequence[str], table: str, **wanted: Any) -> list[Row]:
    """Return the rows of a table of the named sections whose columns have the wanted values."""
    return [
        row
        for name in names
        for row in sections.get(name, {}).get("tables", {}).get(table, [])
        if all(row.get(key) == value for key, value in wanted.items())
    ]


def ratios(theirs: Sequence[Row], ours: Sequence[Row]) -> Iterator[Spread]:
    """Yield their time divided by ours for each pair of rows of the same measurement."""

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(k) for k in ("preset", "x", "batch", "pass", "dtype", "device"))

    for row in ours:
        for other in theirs:
            if key(row) == key(other) and "median ms" in row and "median ms" in other:
                yield _value(other["median ms"] / row["median ms"])


def _value(number: float) -> Spread:
    return Spread.of([number])


def model_rows(sections: Sections, provider: str, title: str, batches: range) -> list[Row]:
    """Return a provider's rows of the model at the published sizes, in bf16."""
    wanted = {"implementation": provider, "pass": title, "dtype": BF16}
    found = find_rows(sections, ["model", "compiled"], "benchmarks", **wanted)
    return [row for row in found if row.get("batch") in batches and row.get("preset") != DEMO]


def model_speedup(provider: str, title: str = FORWARD, batches: range = LARGE_BATCHES) -> Measure:
    """Return a function that yields the speedups of our model over a provider."""

    def measure(sections: Sections) -> Iterator[Spread]:
        theirs = model_rows(sections, provider, title, batches)
        yield from ratios(theirs, model_rows(sections, OURS, title, batches))

    return measure


def fp8_speedup(provider: str) -> Measure:
    """Return a function that yields the speedups of our model in FP8 over a provider."""

    def measure(sections: Sections) -> Iterator[Spread]:
        rows = {
            name: [
                row
                for row in find_rows(sections, ["fp8"], "benchmarks", implementation=name)
                if row.get("batch") in LARGE_BATCHES
            ]
            for name in (provider, OURS_FP8)
        }
        yield from ratios(rows[provider], rows[OURS_FP8])

    return measure


def operator_speedup(name: str, ours: str, theirs: str, title: str) -> Measure:
    """Return a function that yields the speedups of one implementation over another, in bf16."""

    def measure(sections: Sections) -> Iterator[Spread]:
        wanted = {"operator": name, "pass": title, "dtype": BF16}
        names = ["operators", "compiled"]
        yield from ratios(
            find_rows(sections, names, "benchmarks", implementation=theirs, **wanted),
            find_rows(sections, names, "benchmarks", implementation=ours, **wanted),
        )

    return measure


def ceiling(sections: Sections, case: str, unit: str) -> Iterator[float]:
    """Yield the measured rate of each ceiling whose name starts with `case`."""
    for row in find_rows(sections, ["measure"], "ceilings"):
        if row["case"].startswith(case) and unit in row:
            yield row[unit]


def gemm_share(sections: Sections) -> Iterator[Spread]:
    """Yield the per cent of the measured matrix-product rate that the model reaches."""
    for peak in ceiling(sections, "M=", "TFLOP/s"):
        for row in model_rows(sections, OURS, FORWARD, LARGE_BATCHES):
            if "TFLOP/s" in row:
                yield _value(100 * row["TFLOP/s"] / peak)


def copy_share(sections: Sections) -> Iterator[Spread]:
    """Yield the per cent of the measured copy bandwidth that the norm reaches."""
    wanted = {"implementation": "triton", "dtype": BF16, "operator": "td_rms_norm"}
    for peak in ceiling(sections, "copy", "GB/s"):
        for row in find_rows(sections, ["operators"], "benchmarks", **wanted):
            if "GB/s" in row:
                yield _value(100 * row["GB/s"] / peak)


def attention_speedup(sections: Sections) -> Iterator[Spread]:
    """Yield the speedups over attention as published, which section "measure" times."""
    wanted = {"operator": "attention", "implementation": "triton", "dtype": BF16}
    for theirs in find_rows(sections, ["measure"], "SDPA", backend=PUBLISHED):
        same = {key: theirs[key] for key in ("x", "pass")}
        for ours in find_rows(sections, ["operators"], "benchmarks", **wanted, **same):
            if "median ms" in theirs:
                yield _value(theirs["median ms"] / ours["median ms"])


def peak_memory(sections: Sections) -> Iterator[Spread]:
    """Yield the peak GB of a training step of XL/2R at batch 64."""
    for row in model_rows(sections, OURS, TRAINING, range(64, 65)):
        if row.get("preset") == "XL/2R" and "peak GB" in row:
            yield _value(row["peak GB"])


TARGETS: tuple[Target[Sections], ...] = (
    Target("sampling, batch ≥ 64, against published eager", 2.5, 3.5, model_speedup(PUBLISHED)),
    Target("… against torch.compile of it", 1.5, 1.75, model_speedup(PUBLISHED_COMPILED)),
    Target(
        "… against a clean reference, torch.compile", 1.3, 1.5, model_speedup(REFERENCE_COMPILED)
    ),
    Target(
        "sampling, batch 1, against published eager",
        8,
        13,
        model_speedup(PUBLISHED, batches=BATCH_1),
    ),
    Target(
        "… against torch.compile of it with graphs",
        1.5,
        2,
        model_speedup(PUBLISHED_COMPILED, batches=BATCH_1),
    ),
    Target("sampling, batch ≥ 64, share of the GEMM rate", 60, 70, gemm_share, " %"),
    Target("sampling in FP8, batch ≥ 64, against bf16", 1.15, 1.4, fp8_speedup(OURS)),
    Target("… against torchao's FP8, torch.compile", 1, 1.3, fp8_speedup(TORCHAO_FP8)),
    Target(
        "training step against published", 2.5, 3.5, model_speedup(PUBLISHED, TRAINING, ANY_BATCH)
    ),
    Target(
        "… against torch.compile without checkpointing",
        1.3,
        1.6,
        model_speedup(PUBLISHED_COMPILED, TRAINING, ANY_BATCH),
    ),
    Target("training peak memory, XL/2R, batch 64", 60, 40, peak_memory, " GB"),
    Target("norm kernels, share of copy bandwidth", 85, 92, copy_share, " %"),
    Target("attention with casts and pads, against published", 3, 5, attention_speedup),
    Target(
        "depthwise + residual + norm against cuDNN + add + norm",
        2.5,
        4,
        operator_speedup("depthwise_conv2d", "cuda", "reference", "chain"),
    ),
    Target(
        "upsample_add against eager",
        3,
        3.5,
        operator_speedup("upsample_add", "triton", "reference", "forward"),
    ),
)


def judge(results: Mapping[str, Any]) -> list[Row]:
    """Return a row for each target: required and desired value, the worst measured, the verdict.

    A dry run is not judged, since its times mean nothing.
    """
    sections = None if results["dry_run"] else results["sections"]
    judgements = [target.judge(sections) for target in TARGETS]
    return [
        {
            "target": judgement.target.title,
            "required": judgement.target.required(),
            "aim": judgement.target.desired(),
            "measured": judgement.worst and judgement.worst.median,
            "rows": judgement.count,
            "verdict": judgement.verdict,
        }
        for judgement in judgements
    ]
