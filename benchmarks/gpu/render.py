"""Write the GPU report: `report.md`, `results.json` and plots.

Only plots need more than the standard library, so findings are readable whatever breaks on a GPU.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.compare import compare
from benchmarks.gpu.targets import judge
from benchmarks.utils.files import write_atomically
from benchmarks.utils.markdown import table

Results = Mapping[str, Any]
Row = Mapping[str, Any]


def render(results: Results, out: Path) -> None:
    """Write `results.json` and `report.md`."""
    judged = {**results, "targets": judge(results)}
    write_atomically(out / "results.json", json.dumps(judged, indent=1) + "\n")
    write_atomically(out / "report.md", markdown(judged))


def markdown(results: Results) -> str:
    """Return the text of `report.md`."""
    sections = results["sections"]
    facts = sections.get("machine", {}).get("facts", {})
    title = "Dry run of the GPU report" if results["dry_run"] else "GPU report"
    parts = [
        f"# {title}: {facts.get('GPU', 'unknown GPU')}",
        f"{results['date']}, commit {facts.get('commit', 'unknown')}, "
        f"{results['minutes']:g} minutes at most.",
        "\n".join(
            f"**{name}: {text}**" for name, s in sections.items() for text in s.get("warnings", [])
        ),
        "## Targets",
        "Values of this run. The worst of all measured rows counts; `rows` is their number.",
        table(results["targets"]),
        "## Sections",
        table(
            {
                "section": name,
                "status": s["status"],
                "seconds": s.get("seconds", ""),
                "GPU": s.get("GPU", ""),
            }
            for name, s in sections.items()
        ),
    ]
    if compared := table(compare(results)):
        parts += ["## Predicted and measured times", compared]
    for name, section in sections.items():
        parts += _section(name, section)
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(name: str, section: Mapping[str, Any]) -> list[str]:
    parts = [f"## {name}", f"**{section['status']}**"]
    if facts := section.get("facts"):
        parts.append(table({"": key, "value": value} for key, value in facts.items()))
    parts.append("\n".join(f"- {note}" for note in section.get("notes", [])))
    for title, rows in section.get("tables", {}).items():
        if title == "plots":
            parts += [f"![{row['file']}]({row['file']})" for row in rows]
        else:
            parts += [f"### {title}", table(rows)]
    if log := section.get("log"):
        parts += ["The end of its log:", "\n".join(["````", *log, "````"])]
    return parts


def plot(results: Results, out: Path) -> list[Path]:
    """Plot the times of every provider, one figure for each operator and one for the model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [
        row
        for section in ("model", "operators", "compiled")
        for row in results["sections"].get(section, {}).get("tables", {}).get("benchmarks", [])
        if row.get("dtype", "bfloat16") == "bfloat16"
    ]
    files = []
    for operator in dict.fromkeys(row.get("operator", "model") for row in rows):
        shown = [row for row in rows if row.get("operator", "model") == operator]
        labels = ["  ".join(_identity(row)) for row in shown]
        figure, axes = pyplot.subplots(figsize=(9, 1 + 0.25 * len(shown)), layout="constrained")
        axes.barh(range(len(shown)), [row["median ms"] for row in shown])
        axes.set_yticks(range(len(shown)), labels, fontsize=7)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel("median ms")
        axes.set_title(operator)
        files.append(out / f"{operator}.png")
        figure.savefig(files[-1], dpi=110)
        pyplot.close(figure)
    return files


def _identity(row: Row) -> Sequence[str]:
    wanted = ("preset", "batch", "x", "pass", "implementation", "provider")
    return [str(row[key]) for key in wanted if key in row]
