"""What the whole-model benchmarks found, in tables and pictures: `python -m benchmarks.report`.

Reads `results/model_*.json`, one file a machine, as `pytest benchmarks/bench_model.py
--benchmark-only --benchmark-json=benchmarks/results/model_cpu.json` writes them, and
`results/scaling.json`. Draws plots into `results/plots/` and prints the README's section "model".
Figures are medians with the percentiles 20 and 80; those of a ratio are the worst and best that
these allow.
"""

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PUBLISHED, OURS = "published", "ours"
KEEPING = "published, no checkpointing"
PUBLISHED_COMPILED, REFERENCE_COMPILED = "published, compiled", "reference, compiled"
PROVIDERS = (PUBLISHED, KEEPING, PUBLISHED_COMPILED, REFERENCE_COMPILED, OURS)
FORWARD, TRAINING = "forward", "training step"
FP32, BF16 = "float32", "bfloat16"


@dataclass(frozen=True)
class Spread:
    """A median between two percentiles."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of measured values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
        return cls(statistics.median(values), p20, p80)

    def __truediv__(self, other: "Spread") -> "Spread":
        return Spread(self.median / other.median, self.p20 / other.p80, self.p80 / other.p20)

    def times(self, factor: float) -> "Spread":
        """Scaled by a positive number."""
        return Spread(self.median * factor, self.p20 * factor, self.p80 * factor)

    def __str__(self) -> str:
        return f"{_figure(self.median)} ({_figure(self.p20)}–{_figure(self.p80)})"


def _figure(value: float) -> str:
    """Three digits."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


@dataclass(frozen=True)
class Entry:
    """A row of a results file."""

    info: dict[str, Any]
    seconds: Spread

    @property
    def group(self) -> tuple[str, str, int, str]:
        """What the row is of, whoever ran it: preset, pass, batch, dtype."""
        i = self.info
        return i["preset"], i["pass"], i["batch"], i["dtype"]

    @property
    def tflops(self) -> Spread:
        """TFLOP/s, of what the model needs."""
        work = 1e-12 * self.info["flops"]
        return Spread(work, work, work) / self.seconds

    @property
    def gemm_share(self) -> Spread:
        """Per cent of the rate of a linear layer, measured beside the row."""
        names = ("gemm_tflops", "gemm_tflops_p20", "gemm_tflops_p80")
        return (self.tflops / Spread(*(self.info[name] for name in names))).times(100)


@dataclass(frozen=True)
class Report:
    """A results file."""

    name: str
    machine: str
    entries: list[Entry]

    @classmethod
    def read(cls, path: Path) -> "Report":
        """ValueError where the file holds no row."""
        content: dict[str, Any] = json.loads(path.read_text())
        entries = [
            Entry(b["extra_info"], Spread.of(b["stats"]["data"])) for b in content["benchmarks"]
        ]
        if not entries:
            raise ValueError(f"path: got {path}, which holds no benchmark, expected at least one")
        info, machine = entries[0].info, content["machine_info"]
        device = info["device"]
        if device == "CPU":
            device = f"{machine['cpu']['brand_raw']}, {info['threads']} threads"
        when = content["datetime"][:10]
        commit = content["commit_info"].get("id", "unknown")[:9]
        words = f"{device}, torch {info['torch']}, commit {commit}, {when}"
        return cls(path.stem, words, entries)

    @property
    def on_cpu(self) -> bool:
        return bool(self.entries[0].info["device"] == "CPU")

    def groups(self) -> dict[tuple[str, str, int, str], dict[str, Entry]]:
        """The rows of each group by provider."""
        found: dict[tuple[str, str, int, str], dict[str, Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.group, {})[entry.info["implementation"]] = entry
        return found

    def find(self, group: tuple[str, str, int, str], provider: str) -> Entry | None:
        """The row of a group that a provider ran."""
        return self.groups().get(group, {}).get(provider)


@dataclass(frozen=True)
class Target:
    """A goal for one group: `least` is to be reached, `aim` is hoped for.

    `against` names the provider whose time is divided by ours, in `their_dtype`; or it is "gemm",
    the share of the linear layer's rate in per cent. `predicted` was written down before it was
    first measured.
    """

    description: str
    group: tuple[str, str, int, str]
    against: str
    least: float
    aim: float
    their_dtype: str | None = None
    predicted: float | None = None

    @property
    def unit(self) -> str:
        return " %" if self.against == "gemm" else "×"

    def measured(self, report: Report) -> Spread | None:
        """What the report says of it, if it does."""
        ours = report.find(self.group, OURS)
        if ours is None:
            return None
        if self.against == "gemm":
            return ours.gemm_share
        *group, dtype = self.group
        theirs = report.find((*group, self.their_dtype or dtype), self.against)  # type: ignore[arg-type]
        return None if theirs is None else theirs.seconds / ours.seconds

    def verdict(self, report: Report) -> str:
        """Met, missed or not measured, by the median."""
        found = self.measured(report)
        if found is None:
            return "not measured"
        if found.median >= self.aim:
            return "met, aim too"
        return "met" if found.median >= self.least else "missed"


XL_CPU = ("XL/2R", FORWARD, 1, BF16)
SMALL_TRAINING = ("demo-size", TRAINING, 64, BF16)

TARGETS = [
    Target(
        "XL/2R, bf16, against published bf16 autocast",
        XL_CPU,
        PUBLISHED,
        2.5,
        4,
        predicted=1.6,
    ),
    Target(
        "XL/2R, bf16, against published fp32",
        XL_CPU,
        PUBLISHED,
        6,
        10,
        their_dtype=FP32,
        predicted=2.3,
    ),
    Target("XL/2R, share of the bf16 linear rate", XL_CPU, "gemm", 30, 50, predicted=80),
    Target(
        "demo-size training against published without checkpointing",
        SMALL_TRAINING,
        KEEPING,
        3,
        5,
        predicted=3,
    ),
    Target(
        "demo-size training against torch.compile of it",
        SMALL_TRAINING,
        PUBLISHED_COMPILED,
        1.5,
        2.5,
        predicted=2.5,
    ),
]
"""For a CPU; those for a GPU are judged by `gpu_report.py`."""


def section() -> str:
    """The README's section: a table and the targets for each machine, then how time grows."""
    reports = [Report.read(path) for path in sorted(RESULTS.glob("model_*.json"))]
    parts = []
    for report in reports:
        parts.append(table(report))
        if report.on_cpu:
            parts.append(targets(report))
    if not reports:
        parts.append("The whole model has not been measured yet.")
    scaling_file = RESULTS / "scaling.json"
    if scaling_file.is_file():
        parts.append(scaling(json.loads(scaling_file.read_text())))
    parts += [
        f"![{path.stem.replace('_', ' ')}](benchmarks/results/plots/{path.name})"
        for pattern in ("model_*.png", "scaling.png")
        for path in sorted((RESULTS / "plots").glob(pattern))
    ]
    return "\n\n".join(parts)


def table(report: Report) -> str:
    """Ours, a line a group, and how many times faster it is than each other provider."""
    groups = report.groups()
    others = [p for p in PROVIDERS[:-1] if any(p in found for found in groups.values())]
    memory = [] if report.on_cpu else ["peak GB"]
    head = ["preset", "pass", "batch", "dtype", "ms", "images/s", "TFLOP/s", "of GEMM rate, %"]
    lines = []
    for (preset, title, batch, dtype), found in groups.items():
        ours = found.get(OURS)
        if ours is None:
            continue
        cells = [preset, title, str(batch), dtype, str(ours.seconds.times(1e3))]
        cells += [_figure(batch / ours.seconds.median), _figure(ours.tflops.median)]
        cells.append(_figure(ours.gemm_share.median))
        cells += [str(found[p].seconds / ours.seconds) if p in found else "–" for p in others]
        cells += [_figure(1e-9 * ours.info["peak_bytes"]) for _ in memory]
        lines.append(cells)
    return "\n".join(
        [
            f"Ours on {report.machine}, and how many times faster it is than others in the same "
            "run; medians, in brackets the percentiles 20 and 80:",
            "",
            *_markdown([*head, *(f"× {p}" for p in others), *memory], lines),
        ]
    )


def targets(report: Report) -> str:
    """Each target for a CPU, with what was measured and whether it is met."""
    lines = []
    for target in TARGETS:
        found, unit = target.measured(report), target.unit
        measured = "–" if found is None else f"{found}{unit}"
        bounds = [f"{target.least:g}{unit}", f"{target.aim:g}{unit}"]
        predicted = "–" if target.predicted is None else f"{target.predicted:g}{unit}"
        verdict = target.verdict(report)
        lines.append([target.description, *bounds, predicted, measured, verdict])
    head = ["target", "at least", "aim", "predicted", "measured", ""]
    return "\n".join(_markdown(head, lines))


def scaling(report: dict[str, Any]) -> str:
    """How a forward pass and a training step grow, in words."""
    found = []
    for axis, fits in report["axes"].items():
        exponents = [f"{title} {fit['exponent']:.2f}" for title, fit in fits.items()]
        found.append(f"{axis} {', '.join(exponents)}")
    return (
        f"Time of a model like the demo's as a power of its size ({report['device']}, "
        f"{report['dtype']}); exponents fitted: {'; '.join(found)}."
    )


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(f"| {' | '.join(cells)} |" for cells in lines),
    ]


def draw() -> list[Path]:
    """Plots of every results file, into `results/plots/`."""
    from plots import draw_roofline, draw_scaling, draw_speedups

    folder = RESULTS / "plots"
    folder.mkdir(exist_ok=True)
    drawn = []
    for path in sorted(RESULTS.glob("model_*.json")):
        report = Report.read(path)
        for name, picture in (("speedups", draw_speedups), ("roofline", draw_roofline)):
            target = folder / f"{report.name}_{name}.png"
            picture(report, target)
            drawn.append(target)
    if (RESULTS / "scaling.json").is_file():
        drawn.append(folder / "scaling.png")
        draw_scaling(json.loads((RESULTS / "scaling.json").read_text()), drawn[-1])
    return drawn


if __name__ == "__main__":
    # As a module of the folder above, too, it finds its neighbours.
    sys.path.insert(0, str(Path(__file__).parent))
    for file in draw():
        print(file)
    print(section())
