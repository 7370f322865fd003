"""Show the scores of samples over the number of steps."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.utils import machine
from benchmarks.utils.markdown import table
from dimr_fast.checkpoint import demo_model, load_model
from dimr_fast.utils.tensors import sha256_of_named

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "frechet": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
}


@functools.cache
def packaged_weights() -> str:
    """Return the SHA-256 of the weights of the packaged model."""
    return sha256_of_named(load_model(demo_model()).model.state_dict())


def model(report: Mapping[str, Any]) -> str:
    """Say whether the samples are of the packaged model or of an earlier one."""
    current = report["weights_sha256"] == packaged_weights()
    return "the packaged model" if current else "an earlier packaged model"


def curves(report: Mapping[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the title and the rows of each curve: the same solver, spacing and guidance."""
    found: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        found.setdefault((row["solver"], row["spacing"], row["guidance"]), []).append(row)
    for (solver, spacing, guidance), rows in found.items():
        yield f"{solver}, {spacing}, guidance {guidance:g}", rows


def rate(report: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """Return the images a second of a row's number of evaluations, None if not measured."""
    for found in report.get("rates", ()):
        if found["steps"] == row["steps"] and found["guided"] == (row["guidance"] != 0):
            return found["images_per_second"]
    return None


def sampling_text(report: Mapping[str, Any]) -> str:
    """Return the tables of `results/sampling_curve.json`."""
    every = sorted({row["steps"] for row in report["rows"]})
    distances = [
        {"solver, spacing, guidance": title}
        | {str(steps): None for steps in every}
        | {str(row["steps"]): f"{row['frechet']:.1f}" for row in rows}
        for title, rows in curves(report)
    ]
    rates = [
        {"images a second": "with guidance" if guided else "without"}
        | {
            str(found["steps"]): f"{found['images_per_second']:.3g}"
            for found in report.get("rates", ())
            if found["guided"] == guided
        }
        for guided in (True, False)
    ]
    text = (
        f"Fréchet distance on {report['recipe']} of {report['count']} samples of {model(report)} "
        "to the held-out tiles, by the number of steps, from the same noise "
        f"({machine.summary(report)}). Fewer samples have larger distances. A "
        "step evaluates the network once for each image, and twice with guidance.\n\n"
        f"{table(distances)}"
    )
    return f"{text}\n\n{table(rates)}" if report.get("rates") else text


def guidance_text(report: Mapping[str, Any]) -> str:
    """Return the table of `results/guidance.json`."""
    rows = [
        {
            "guidance": f"{row['guidance']:g}",
            "at times": "{:g}..{:g}".format(*row["guidance_interval"]),
            "evaluations of an image": f"{row['evaluations']:g}",
            "Fréchet distance": f"{row['frechet']:.1f}",
            "precision": f"{row['precision']:.3f}",
            "recall": f"{row['recall']:.3f}",
        }
        for row in report["rows"]
    ]
    sampling = report["sampling"]
    return (
        f"Scores on {report['recipe']} of {report['count']} samples of {model(report)}, drawn "
        f"by {sampling['solver']} with {sampling['steps']} steps uniform in {sampling['spacing']}, "
        f"from the same noise ({machine.summary(report)}). Time 1 is noise, time 0 the image.\n\n"
        f"{table(rows)}"
    )


def averages_text(report: Mapping[str, Any]) -> str:
    """Return the tables of `results/averages.json`."""
    lengths = sorted({row["length"] for row in report["rows"]})
    plain = [row for row in report["rows"] if row["guide"] is None]
    distances = [
        {"of the run": f"{phase:.0%}"}
        | {
            f"length {length:g}": f"{row['frechet']:.1f}"
            for length in lengths
            for row in plain
            if (row["phase"], row["length"]) == (phase, length)
        }
        for phase in sorted({row["phase"] for row in plain})
    ]
    guides = [
        {
            "guide ends at": f"{row['guide'][0]:.0%}",
            "its length": f"{row['guide'][1]:g}",
            "strength": f"{row['strength']:g}",
            "evaluations of an image": f"{row['evaluations']:g}",
            "Fréchet distance": f"{row['frechet']:.1f}",
            "precision": f"{row['precision']:.3f}",
            "recall": f"{row['recall']:.3f}",
        }
        for row in sorted(
            (row for row in report["rows"] if row["guide"] is not None),
            key=lambda row: (row["guide"], row["strength"]),
        )
    ]
    text = (
        f"Fréchet distance on {report['recipe']} of {report['count']} samples, drawn with averages "
        "of the weights of the packaged model's run: relative lengths, and averages that ended "
        f"earlier in the run ({machine.summary(report)}).\n\n{table(distances)}"
    )
    if not guides:
        return text
    (length,) = {row["length"] for row in report["rows"] if row["guide"] is not None}
    return (
        f"{text}\n\nThe average of length {length:g} at the end of the run, guided by an earlier "
        f"average (autoguidance):\n\n{table(guides)}"
    )


def draw_sampling_curve(report: Mapping[str, Any], target: Path) -> None:
    """Plot distance, precision and recall over steps, and the distance over images/s."""
    measured = bool(report.get("rates"))
    figure, panels = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    shown = {}
    every = sorted({row["steps"] for row in report["rows"]})
    for place, (title, rows) in enumerate(curves(report)):
        color = plt.get_cmap("tab20")(place % 20)
        # The line style is the spacing, so that the two curves of a solver are distinct.
        style = "-" if rows[0]["spacing"] == "log_snr" else "--"
        for axes, (name, label) in zip(panels.flat, PANELS.items(), strict=False):
            (line,) = axes.plot(
                [row["steps"] for row in rows],
                [row[name] for row in rows],
                style,
                marker=".",
                linewidth=1,
                color=color,
            )
            axes.set(xscale="log", xlabel="steps", ylabel=label)
            axes.set_xticks(every, [str(steps) for steps in every])
            axes.set_xticks([], minor=True)
            shown.setdefault(title, line)
        if measured:
            panels[1][1].plot(
                [rate(report, row) for row in rows],
                [row["frechet"] for row in rows],
                style,
                marker=".",
                linewidth=1,
                color=color,
            )
    # Few evaluations of some solvers give far larger distances, which would hide the rest.
    best = min(row["frechet"] for row in report["rows"])
    panels[0][0].set_ylim(0.95 * best, 1.6 * best)
    if measured:
        panels[1][1].set(xscale="log", xlabel="images a second", ylabel=PANELS["frechet"])
        panels[1][1].xaxis.set_major_formatter("{x:g}")
        panels[1][1].set_ylim(0.95 * best, 1.6 * best)
    else:
        panels[1][1].set_axis_off()
    for axes in panels.flat:
        axes.grid(alpha=0.3, which="both", linewidth=0.4)
    figure.suptitle(
        f"{report['count']} samples of {model(report)}. {machine.summary(report)}", fontsize=9
    )
    figure.legend(
        shown.values(), shown, loc="outside lower center", ncols=3, fontsize=7, frameon=False
    )
    figure.savefig(target, dpi=110)
    plt.close(figure)
