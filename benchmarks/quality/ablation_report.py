"""What the ablation found, as a file, a table and a picture."""

import datetime
import json
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .models import ARMS, CHANNELS, SIDE

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "ablation.json"
PLOT = RESULT.parent / "plots" / "ablation.png"
CODE = ("dimr_fast", "csrc", "benchmarks/quality")
"""What a result depends on."""
OURS, PAPERS = "#2f6fb0", "#9a9a9a"


def commit() -> str:
    """The commit of the code a process runs, asked when it starts; a plus marks changes to it."""
    return _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", *CODE) else "")


def collect(state: Path, commit: str) -> dict[str, Any]:
    """Every score in a state folder, with what the arms are and where they were trained."""
    recipe = json.loads((state / "recipe.json").read_text())
    scores = [json.loads(path.read_text()) for path in sorted(state.glob("seed*_*.json"))]
    return {
        "machine": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "settings": recipe,
        "arms": {key: describe(key) for key in ARMS},
        "runs": scores,
    }


def describe(key: str, num_classes: int = 7) -> dict[str, Any]:
    """An arm: its parameters, and the FLOPs (two a multiply-add) of one image forward."""
    arm = ARMS[key]
    with torch.device("meta"):
        model = arm.build(num_classes).set_implementation("reference")
        x = torch.empty(1, CHANNELS, SIDE, SIDE)
        log_snr, y = torch.empty(1), torch.empty(1, dtype=torch.int64)
        counting = {torch.ops.aten.addmm_: _in_place_product}
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=counting) as counted:
            model(x, log_snr=log_snr, y=y)
    return {
        "title": arm.title,
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": counted.get_total_flops(),
        "paper_fid": arm.paper_fid,
    }


def _in_place_product(out: list[int], a: list[int], b: list[int], *, out_shape: Any) -> int:
    """Of a skip's second half, which torch's own counter does not know."""
    return 2 * a[0] * a[1] * b[1]


def section() -> str:
    """The README's: a table of the arms, and how it came about."""
    if not RESULT.is_file():
        return "The ablation has not been run yet."
    report = json.loads(RESULT.read_text())
    plot = PLOT.relative_to(ROOT).as_posix()
    return f"{table(report)}\n\n![Fréchet distance of each arm, and the paper's FID]({plot})"


def table(report: dict[str, Any]) -> str:
    """Means over the seeds; of the distance, where there are several, least and most too."""
    settings, runs = report["settings"], report["runs"]
    seeds = sorted({run["seed"] for run in runs})
    lines = [
        f"32×32 satellite tiles, {settings['minutes']:g} minutes of CPU time an arm "
        f"({report['machine']}, one thread, {settings['precision']}, torch {report['torch']}, "
        f"commit {report['commit'][:9]}, {report['date']}), "
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}; "
        f"Fréchet distance on {runs[0]['frechet_recipe']} (as many training tiles: "
        f"{runs[0]['frechet_training']:.0f}), {settings['sampling_steps']} steps, guidance "
        f"{settings['guidance']:g}; the paper's FID is of 64×64 ImageNet:",
        "",
        "| arm | parameters | GFLOP/image | images per CPU second | steps | held-out loss "
        "| Fréchet distance | FID, paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, arm in report["arms"].items():
        found = [run for run in runs if run["arm"] == key]
        if not found:
            continue
        mean = {
            name: statistics.fmean(run[name] for run in found)
            for name in ("images_per_cpu_second", "steps", "held_out_loss")
        }
        lines.append(
            f"| {key}. {arm['title']} | {arm['parameters'] / 1e6:.2f}M | {arm['flops'] / 1e9:.2f} "
            f"| {mean['images_per_cpu_second']:.1f} | {mean['steps']:,.0f} "
            f"| {mean['held_out_loss']:.4f} | {_spread([run['frechet'] for run in found])} "
            f"| {arm['paper_fid']} |"
        )
    return "\n".join(lines)


def draw(report: dict[str, Any], target: Path) -> None:
    """Fréchet distance per arm, a mark a seed, beside the paper's FID."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = report["arms"]
    figure, (ours, papers) = plt.subplots(
        1, 2, figsize=(9, 3.6), layout="constrained", sharey=True, width_ratios=(3, 2)
    )
    for place, (key, arm) in enumerate(arms.items()):
        found = [run["frechet"] for run in report["runs"] if run["arm"] == key]
        if found:
            mean = statistics.fmean(found)
            ours.barh(place, mean, 0.6, color=OURS)
            ours.scatter(found, [place] * len(found), color="black", s=14, zorder=3)
            _label(ours, place, f"{mean:.0f}")
        papers.barh(place, arm["paper_fid"], 0.6, color=PAPERS)
        _label(papers, place, f"{arm['paper_fid']:.2f}")
    ours.set_yticks(range(len(arms)), [f"{key}. {arm['title']}" for key, arm in arms.items()])
    ours.invert_yaxis()
    minutes = report["settings"]["minutes"]
    ours.set_xlabel(f"Fréchet distance, {minutes:g} CPU minutes an arm (dots: seeds)")
    papers.set_xlabel("FID, paper (64×64 ImageNet)")
    figure.suptitle(f"32×32 satellite tiles. {report['machine']}, one thread", fontsize=9)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _label(axes: Any, place: int, text: str) -> None:
    axes.annotate(
        text, (0, place), (4, 0), textcoords="offset points", va="center", color="white", fontsize=8
    )


def _spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f}–{max(values):.1f})"


def _processor() -> str:
    names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    return names[0] if names else "unknown processor"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()
