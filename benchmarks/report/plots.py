"""Plot the results of the whole model's benchmark, and draw the plots of the others."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.ablation.report import draw_ablation
from benchmarks.report.results import Group, ModelResults
from benchmarks.report.sampling import draw_sampling_curve
from benchmarks.utils import machine
from benchmarks.utils.files import PLOTS, RESULTS
from benchmarks.utils.names import (
    OURS,
    OURS_FP8,
    OURS_INT8,
    PUBLISHED,
    PUBLISHED_COMPILED,
    PUBLISHED_NO_CHECKPOINTING,
    REFERENCE_COMPILED,
    TORCHAO_FP8,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {
    PUBLISHED: "#9a9a9a",
    PUBLISHED_NO_CHECKPOINTING: "#c4c4c4",
    PUBLISHED_COMPILED: "#e0a458",
    REFERENCE_COMPILED: "#7fb069",
    TORCHAO_FP8: "#b07aa1",
    OURS: "#2f6fb0",
    OURS_FP8: "#76b7d8",
    OURS_INT8: "#5fa3c7",
}


def draw_all(folder: Path = PLOTS) -> list[Path]:
    """Draw the plots of every results file into a folder; return their paths."""
    folder.mkdir(exist_ok=True)
    drawn = []
    for path in sorted(RESULTS.glob("model_*.json")):
        results = ModelResults.read(path)
        for name, draw in (("speedups", draw_speedups), ("roofline", draw_roofline)):
            drawn.append(folder / f"{results.name}_{name}.png")
            draw(results, drawn[-1])
    for name, draw_report in (
        ("scaling", draw_scaling),
        ("ablation", draw_ablation),
        ("ablation_long", draw_ablation),
        ("sampling_curve", draw_sampling_curve),
    ):
        if (RESULTS / f"{name}.json").is_file():
            drawn.append(folder / f"{name}.png")
            draw_report(json.loads((RESULTS / f"{name}.json").read_text()), drawn[-1])
    return drawn


def draw_speedups(results: ModelResults, target: Path) -> None:
    """Plot the speed of each provider relative to the published execution."""
    groups = {g: found for g, found in results.groups().items() if {OURS, PUBLISHED} <= set(found)}
    providers = [p for p in COLORS if any(p in found for found in groups.values())]
    figure, axes = plt.subplots(figsize=(9, 0.5 + 0.75 * len(groups)), layout="constrained")
    height = 0.8 / len(providers)
    for provider in providers:
        places, ratios, errors = [], [], []
        for j, found in enumerate(groups.values()):
            if provider in found:
                ratio = found[PUBLISHED].seconds / found[provider].seconds
                beside = [p for p in providers if p in found]
                place = beside.index(provider) - (len(beside) - 1) / 2
                places.append(j + place * height)
                ratios.append(ratio.median)
                errors.append((ratio.median - ratio.p20, ratio.p80 - ratio.median))
        axes.barh(
            places,
            ratios,
            height,
            xerr=list(zip(*errors, strict=True)),
            error_kw={"elinewidth": 0.8},
            color=COLORS[provider],
            label=provider,
        )
        for place, ratio in zip(places, ratios, strict=True):
            axes.annotate(
                f"{ratio:.1f}",
                (0, place),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
    axes.set_yticks(range(len(groups)), [_title(group) for group in groups])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("speed relative to the published execution")
    axes.set_title(results.machine, fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def draw_roofline(results: ModelResults, target: Path) -> None:
    """Plot forward passes below the measured rates of a linear layer and of a copy."""
    entries = [e for e in results.entries if "bytes" in e.info]
    dtypes = sorted({e.info["dtype"] for e in entries})
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(5 * len(dtypes), 4.6), layout="constrained", squeeze=False
    )
    shown = {}
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        rows = [e for e in entries if e.info["dtype"] == dtype]
        peak = max(e.info["gemm_tflops"] for e in rows)
        band = max(e.info["copy_gbps"] for e in rows) / 1e3
        work = [e.info["flops"] / e.info["bytes"] for e in rows]
        low, high = min(min(work) / 3, peak / band / 3), max(max(work) * 3, peak / band * 3)
        axes.plot([low, peak / band, high], [low * band, peak, peak], color="black", linewidth=1)
        for e, x in zip(rows, work, strict=True):
            provider = e.provider
            mark = axes.scatter(
                x, e.tflops.median, color=COLORS[provider], s=28 if provider == OURS else 16
            )
            shown.setdefault(provider, mark)
        ours = [(x, e) for e, x in zip(rows, work, strict=True) if e.provider == OURS]
        ours.sort(key=lambda point: point[0])
        beside, before = 0, 0.0
        for x, e in ours:
            # Labels of close points are placed one above the other.
            beside, before = (beside + 1 if x < 1.5 * before else 0), x
            axes.annotate(
                f"{e.info['preset']}, {e.info['batch']}",
                (x, e.tflops.median),
                xytext=(-8, 4 - 10 * beside),
                textcoords="offset points",
                ha="right",
                fontsize=7,
            )
        axes.set(xscale="log", yscale="log", title=dtype)
        axes.set_xlabel("FLOP per byte of least memory traffic")
        axes.grid(alpha=0.3, which="both", linewidth=0.4)
    panels[0][0].set_ylabel("TFLOP/s (line: linear layer, copy)")
    figure.suptitle(f"Forward passes (preset, batch). {results.machine}", fontsize=9)
    figure.legend(
        shown.values(),
        shown,
        loc="outside lower center",
        ncols=len(shown),
        fontsize=8,
        frameon=False,
    )
    figure.savefig(target, dpi=110)
    plt.close(figure)


def draw_scaling(report: Mapping[str, Any], target: Path) -> None:
    """Plot time against each size, with the fitted powers."""
    axes_of = report["axes"]
    figure, panels = plt.subplots(
        1, len(axes_of), figsize=(4 * len(axes_of), 3.6), layout="constrained", squeeze=False
    )
    for axes, (name, fits) in zip(panels[0], axes_of.items(), strict=True):
        for color, (title, fit) in zip(("#2f6fb0", "#e0a458"), fits.items(), strict=False):
            sizes = fit["sizes"]
            axes.scatter(sizes, [1e3 * s for s in fit["seconds"]], color=color, s=18)
            power = [1e3 * fit["factor"] * size ** fit["exponent"] for size in sizes]
            label = f"{title}, exponent {fit['exponent']:.2f}"
            axes.plot(sizes, power, color=color, linewidth=1, label=label)
        axes.set(xscale="log", yscale="log", xlabel=name)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.legend(fontsize=7, loc="upper left")
        axes.grid(alpha=0.3, linewidth=0.4)
    panels[0][0].set_ylabel("ms")
    figure.suptitle(
        f"A model like the demo's, {report['dtype']}. {machine.summary(report)}", fontsize=9
    )
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _title(group: Group) -> str:
    return f"{group.preset}, {group.title},\nbatch {group.batch}, {group.dtype}"
