"""Collect the results of the ablation; make its table and plot, and the table of recipes."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ablation.models import ARMS, CHANNELS, SIDE
from benchmarks.utils import machine
from benchmarks.utils.files import RESULTS
from benchmarks.utils.markdown import table
from benchmarks.utils.spread import figure

RESULT = RESULTS / "ablation.json"
RECIPES_RESULT = RESULTS / "recipes.json"
DISTILLATION_RESULT = RESULTS / "distillation.json"
CODE = ("dimr_fast", "csrc", "benchmarks/ablation")
"""Code that a result depends on: changes to it are marked beside the commit."""
OUR_COLOR, PAPER_COLOR = "#2f6fb0", "#9a9a9a"


def collect(state: Path, commit: str) -> dict[str, Any]:
    """Return all scores in a state folder, with the arms, the machine and the settings.

    `commit` names the code, as `machine.commit(*CODE)` returned it when the process started.
    """
    recipe = json.loads((state / "recipe.json").read_text())
    scores = [json.loads(path.read_text()) for path in sorted(state.glob("seed*_*.json"))]
    return {
        **machine.description(),
        "commit": commit,
        "settings": recipe,
        "arms": {key: describe(key) for key in sorted({score["arm"] for score in scores})},
        "runs": scores,
    }


def describe(key: str, num_classes: int = 7) -> dict[str, Any]:
    """Return title, parameters and FLOP (one image forward) of an arm."""
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
    """Count the in-place product of a skip, which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


def ablation_table(report: Mapping[str, Any]) -> str:
    """Return a table of the arms: means over the seeds, with the range of the distance."""
    settings, runs = report["settings"], report["runs"]
    seeds = sorted({run["seed"] for run in runs})
    rows = []
    for key, arm in report["arms"].items():
        found = [run for run in runs if run["arm"] == key]
        mean = {
            name: statistics.fmean(run[name] for run in found)
            for name in ("images_per_cpu_second", "steps", "held_out_loss")
        }
        rows.append(
            {
                "arm": f"{key}. {arm['title']}",
                "parameters": f"{arm['parameters'] / 1e6:.2f}M",
                "GFLOP/image": f"{arm['flops'] / 1e9:.2f}",
                "images per CPU second": figure(mean["images_per_cpu_second"]),
                "steps": f"{mean['steps']:,.0f}",
                "held-out loss": f"{mean['held_out_loss']:.4f}",
                "Fréchet distance": _range([run["frechet"] for run in found]),
                "FID, paper": arm["paper_fid"],
            }
        )
    return (
        f"32×32 satellite tiles, {settings['minutes']:g} minutes of CPU time for each arm "
        f"({machine_line(report)}, {settings['precision']}), "
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}. "
        f"Fréchet distance on {runs[0]['frechet_recipe']} (as many training tiles: "
        f"{runs[0]['frechet_training']:.0f}), {settings['sampling_steps']} steps, guidance "
        f"{settings['guidance']:g}. The paper's FID is for 64×64 ImageNet.\n\n{table(rows)}"
    )


def recipe_table(report: Mapping[str, Any]) -> str:
    """Return a table of scores and of CPU time for each arm of the report: means over the seeds."""
    times = {name: spread["median"] for name, spread in report["milliseconds"].items()}
    steps = {name: times["gradient"] + times[name] for name in ("adamw", "muon")}
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for run in report["runs"]:
        arms.setdefault(run["arm"], []).append(run)
    rows = []
    for arm, runs in sorted(arms.items(), key=lambda item: _mean(item[1], "frechet")):
        rows.append(
            {
                "changed settings": f"`{arm}`",
                "seeds": len(runs),
                "held-out loss half-way": f"{_mean(runs, 'half_way_loss'):.4f}",
                "at the end": f"{_mean(runs, 'held_out_loss'):.4f}",
                "Fréchet distance": _range([run["frechet"] for run in runs]),
                "precision": f"{_mean(runs, 'precision'):.2f}",
                "recall": f"{_mean(runs, 'recall'):.2f}",
                "CPU ms a step": f"{steps[runs[0]['optimizer']]:.0f}",
            }
        )
    sampling = report["sampling"]
    return (
        f"The demo's model, {report['steps']} steps of {report['batch_size']} images; EMA weights "
        f"on {report['held_out_tiles']:,} held-out tiles; {report['images']} samples "
        f"({sampling['solver']}, {sampling['steps']} steps, guidance {sampling['guidance']:g}; "
        f"{report['features']}). {machine.summary(report)}, {report['precision']}.\n\n"
        f"{table(rows)}\n\n"
        f"Of the time of a step, the update takes {figure(times['adamw'])} ms with AdamW and "
        f"{figure(times['muon'])} ms with Muon; a step with Muon takes "
        f"{steps['muon'] / steps['adamw'] - 1:.0%} more time. `torch.optim.Muon`, one matrix at a "
        f"time and in bf16, takes {figure(times['torch.optim.Muon'])} ms for the update."
    )


def distillation_table(report: Mapping[str, Any]) -> str:
    """Return a table of the scores and the speed of each student, and of its teacher."""
    rows = [
        {
            "model": f"`{row['name']}`" if "=" in row["name"] else row["name"],
            "evaluations of an image": f"{row['evaluations']:g}",
            "steps of training": row["steps"],
            "Fréchet distance": f"{row['frechet']:.1f}",
            "precision": f"{row['precision']:.2f}",
            "recall": f"{row['recall']:.2f}",
            "images a second": figure(row["images_per_second"]),
        }
        for row in report["rows"]
    ]
    return (
        f"Fréchet distance on {report['features']} of {report['images']:,} samples to the held-out "
        f"tiles. The teacher is the packaged model; students of the recipe `distill` with changes "
        f"have {report['steps']} steps. {machine.summary(report)}.\n\n{table(rows)}"
    )


def cost_of_an_image(report: Mapping[str, Any]) -> str:
    """Return in words what an image of the packaged model costs, of its student, and before."""
    named = {row["name"]: row for row in report["rows"]}
    parts = [
        f"{subject} {row['images_per_second']:.3g} images a second with {row['evaluations']:g} "
        f"evaluations each and a Fréchet distance of {row['frechet']:.0f}"
        for name, subject in (
            ("teacher, by default", "the packaged model draws"),
            ("demo-distilled", "its distilled form"),
            ("teacher, default of earlier versions", "the published solver with guidance"),
        )
        if (row := named.get(name))
    ]
    threads = f"{report['threads']} thread{'s' if report['threads'] > 1 else ''}"
    return f"On {threads} {'; '.join(parts)} ({report['images']:,} samples)."


def _mean(runs: list[Mapping[str, Any]], name: str) -> float:
    return statistics.fmean(run[name] for run in runs)


def machine_line(report: Mapping[str, Any]) -> str:
    """Return the machine in one line; older files name the device "machine"."""
    return machine.summary({"device": report.get("machine"), **report})


def draw_ablation(report: Mapping[str, Any], target: Path) -> None:
    """Plot the Fréchet distance of each arm, with a dot for each seed, and the paper's FID."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = report["arms"]
    figure, (ours, papers) = plt.subplots(
        1, 2, figsize=(9, 3.6), layout="constrained", sharey=True, width_ratios=(3, 2)
    )
    for place, (key, arm) in enumerate(arms.items()):
        found = [run["frechet"] for run in report["runs"] if run["arm"] == key]
        mean = statistics.fmean(found)
        ours.barh(place, mean, 0.6, color=OUR_COLOR)
        ours.scatter(found, [place] * len(found), color="black", s=14, zorder=3)
        _label(ours, place, f"{mean:.0f}")
        papers.barh(place, arm["paper_fid"], 0.6, color=PAPER_COLOR)
        _label(papers, place, f"{arm['paper_fid']:.2f}")
    ours.set_yticks(range(len(arms)), [f"{key}. {arm['title']}" for key, arm in arms.items()])
    ours.invert_yaxis()
    minutes = report["settings"]["minutes"]
    ours.set_xlabel(f"Fréchet distance, {minutes:g} CPU minutes for each arm (dots: seeds)")
    papers.set_xlabel("FID, paper (64×64 ImageNet)")
    figure.suptitle(f"32×32 satellite tiles. {machine_line(report)}", fontsize=9)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _label(axes: Any, place: int, text: str) -> None:
    axes.annotate(
        text, (0, place), (4, 0), textcoords="offset points", va="center", color="white", fontsize=8
    )


def _range(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f}–{max(values):.1f})"
