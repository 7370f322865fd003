"""The targets that a GPU has to meet, and what the rows of a report say of each.

A row is what a benchmark says of itself (`extra_info`) with its times; the names below are those
of `bench_model.py`. Nothing is compared across runs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OURS = "ours"
PUBLISHED = "published"
COMPILED = "published, compiled"
"""By torch.compile, which keeps its activations."""
CLEAN = "reference, compiled"
DEMO = "demo"
FORWARD, TRAINING = "forward", "training step"
ONE, LARGE, ANY = range(1, 2), range(64, 2**30), range(1, 2**30)
"""Batches that a target is about."""

Row = Mapping[str, Any]
Sections = Mapping[str, Mapping[str, Any]]
Values = Iterator[float]


def rows(sections: Sections, names: Sequence[str], table: str, **wanted: Any) -> list[Row]:
    """The rows of a table, in these sections, that say what is wanted."""
    return [
        row
        for name in names
        for row in sections.get(name, {}).get("tables", {}).get(table, [])
        if all(row.get(key) == value for key, value in wanted.items())
    ]


def ratios(theirs: Sequence[Row], ours: Sequence[Row]) -> Values:
    """Their time over ours, wherever both were measured on the same."""

    def same(row: Row) -> tuple[Any, ...]:
        keys = ("preset", "x", "batch", "pass", "dtype", "device")
        return tuple(row.get(key) for key in keys)

    for row in ours:
        for other in theirs:
            if same(row) == same(other) and "median ms" in row and "median ms" in other:
                yield other["median ms"] / row["median ms"]


def model(sections: Sections, implementation: str, title: str, batches: range) -> list[Row]:
    """The model's rows at the published sizes, in bf16."""
    wanted = {"implementation": implementation, "pass": title, "dtype": "bfloat16"}
    found = rows(sections, ["model", "compiled"], "benchmarks", **wanted)
    return [row for row in found if row.get("batch") in batches and row.get("preset") != DEMO]


def against(
    other: str, title: str = FORWARD, batches: range = LARGE
) -> Callable[[Sections], Values]:
    return lambda sections: ratios(
        model(sections, other, title, batches), model(sections, OURS, title, batches)
    )


def operator(name: str, ours: str, theirs: str, title: str) -> Callable[[Sections], Values]:
    """Time of one implementation of an operator over that of another, in bf16."""

    def values(sections: Sections) -> Values:
        wanted = {"operator": name, "pass": title, "dtype": "bfloat16"}
        names = ["operators", "compiled"]
        yield from ratios(
            rows(sections, names, "benchmarks", implementation=theirs, **wanted),
            rows(sections, names, "benchmarks", implementation=ours, **wanted),
        )

    return values


def ceiling(sections: Sections, what: str, unit: str) -> Values:
    for row in rows(sections, ["measure"], "ceilings"):
        if row["what"].startswith(what) and unit in row:
            yield row[unit]


def gemm_share(sections: Sections) -> Values:
    for peak in ceiling(sections, "M=", "TFLOP/s"):
        for row in model(sections, OURS, FORWARD, LARGE):
            if "TFLOP/s" in row:
                yield 100 * row["TFLOP/s"] / peak


def copy_share(sections: Sections) -> Values:
    wanted = {"implementation": "triton", "dtype": "bfloat16", "operator": "td_rms_norm"}
    for peak in ceiling(sections, "copy", "GB/s"):
        for row in rows(sections, ["operators"], "benchmarks", **wanted):
            if "GB/s" in row:
                yield 100 * row["GB/s"] / peak


def published_attention(sections: Sections) -> Values:
    """Of the same tensors: the published one is among the questions that are measured first."""
    wanted = {"operator": "attention", "implementation": "triton", "dtype": "bfloat16"}
    for theirs in rows(sections, ["measure"], "SDPA", backend=PUBLISHED):
        same = {key: theirs[key] for key in ("x", "pass")}
        for ours in rows(sections, ["operators"], "benchmarks", **wanted, **same):
            if "median ms" in theirs:
                yield theirs["median ms"] / ours["median ms"]


def peak_memory(sections: Sections) -> Values:
    for row in model(sections, OURS, TRAINING, range(64, 65)):
        if row.get("preset") == "XL/2R" and "peak GB" in row:
            yield row["peak GB"]


@dataclass(frozen=True)
class Target:
    """At least `least`, hoped for `aim`; at most, where `aim` is the smaller."""

    what: str
    least: float
    aim: float
    values: Callable[[Sections], Values]
    unit: str = "×"

    def judge(self, sections: Sections) -> Row:
        found = list(self.values(sections))
        more = self.aim > self.least
        worst = (min if more else max)(found, default=None)
        verdict = "not measured"
        if worst is not None:
            sign = 1 if more else -1
            verdict = "missed"
            if sign * worst >= sign * self.least:
                verdict = "met"
            if sign * worst >= sign * self.aim:
                verdict = "met, and its aim"
        return {
            "target": self.what,
            "required": f"{'≥' if more else '≤'} {self.least:g}{self.unit}",
            "aim": f"{self.aim:g}{self.unit}",
            "measured": worst,
            "of": len(found),
            "verdict": verdict,
        }


TARGETS = (
    Target("sampling, batch ≥ 64, against published eager", 2.5, 3.5, against(PUBLISHED)),
    Target("… against torch.compile of it", 1.5, 1.75, against(COMPILED)),
    Target("… against a clean reference, torch.compile", 1.3, 1.5, against(CLEAN)),
    Target("sampling, batch 1, against published eager", 8, 13, against(PUBLISHED, batches=ONE)),
    Target("… against torch.compile of it with graphs", 1.5, 2, against(COMPILED, batches=ONE)),
    Target("sampling, batch ≥ 64, share of the GEMM rate", 60, 70, gemm_share, " %"),
    Target("training step against published", 2.5, 3.5, against(PUBLISHED, TRAINING, ANY)),
    Target(
        "… against torch.compile without checkpointing",
        1.3,
        1.6,
        against(COMPILED, TRAINING, ANY),
    ),
    Target("training peak memory, XL/2R, batch 64", 60, 40, peak_memory, " GB"),
    Target("norm kernels, share of copy bandwidth", 85, 92, copy_share, " %"),
    Target("attention with casts and pads, against published", 3, 5, published_attention),
    Target(
        "depthwise + residual + norm against cuDNN + add + norm",
        2.5,
        4,
        operator("depthwise_conv2d", "cuda", "reference", "chain"),
    ),
    Target(
        "upsample_add against eager",
        3,
        3.5,
        operator("upsample_add", "triton", "reference", "forward"),
    ),
)
"""Those for a GPU; a CPU's are not judged here."""


def judge(results: Mapping[str, Any]) -> list[Row]:
    """A row for each target: what is required, the worst that was measured, and the verdict.

    A dry run's times say nothing and are not judged.
    """
    sections = {} if results["dry_run"] else results["sections"]
    return [target.judge(sections) for target in TARGETS]
