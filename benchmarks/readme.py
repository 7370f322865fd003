"""Write the README's generated sections: `python benchmarks/readme.py`.

Operators come from the registry, figures from the files that the demo and the benchmarks wrote to
`benchmarks/results/`. `render` is what a test compares the README with.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from quality.ablation_report import section as ablation
from report import section as whole_model

from dimr_fast.ops import OPERATORS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def operators() -> str:
    """Operators × implementations, as registered."""
    names = sorted({n for o in OPERATORS.values() for n in o.names} - {"reference"})
    columns = [*names, "reference"]
    rows = [
        f"| `{name}` | {' | '.join('yes' if c in o.names else '–' for c in columns)} |"
        for name, o in sorted(OPERATORS.items())
    ]
    return "\n".join(
        [f"| operator | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|", *rows]
    )


def demo_result() -> str:
    """What the committed run of the demo says of itself."""
    run: dict[str, Any] = json.loads((RESULTS / "demo" / "demo.json").read_text())
    training, sampling, scores = run["training"], run["sampling"], run["scores"]
    return (
        f"Tiles drawn by the demo after {training['steps']:,} steps in "
        f"{training['seconds'] / 60:.0f} minutes on {training['device']} "
        f"({training['images_per_second']:.0f} images/s, {training['precision']}, "
        f"{training['parameters'] / 1e6:.1f}M parameters; {sampling['solver']}, "
        f"{sampling['steps']} steps, guidance {sampling['guidance']}). "
        f"Fréchet distance on {scores['recipe']}, {scores['count']} images against "
        f"{scores['held_out_count']} held-out tiles: samples {scores['samples']:.0f}, as many "
        f"training tiles {scores['training']:.0f}, noise {scores['noise']:.0f}."
    )


def launches() -> str:
    """Kernels launched by a forward pass, as counted on the meta device."""
    report: dict[str, Any] = json.loads((RESULTS / "launches.json").read_text())
    lines = [
        "| kernels launched per forward, batch 1 | published | plain PyTorch | Triton |",
        "|---|---|---|---|",
    ]
    for preset, counts in report["presets"].items():
        plain, ours = (sum(counts[name].values()) for name in ("reference", "triton"))
        lines.append(f"| {preset} | {counts['published']:,} | {plain:,} | {ours:,} |")
    return "\n".join(lines)


def benchmarks() -> str:
    """Median times of each operator's benchmark, a row a shape, pass and dtype."""
    paths = sorted(set(RESULTS.glob("*_cpu.json")) - set(RESULTS.glob("model_*.json")))
    return "\n\n".join(_table(path) for path in paths)


def _table(path: Path) -> str:
    report = json.loads(path.read_text())
    rows: dict[tuple[str, ...], dict[str, float]] = {}
    for entry in report["benchmarks"]:
        info = entry["extra_info"]
        if info.get("interpreted"):
            continue
        key = ("×".join(map(str, info["shape"])), info["pass"], info["dtype"])
        rows.setdefault(key, {})[info["implementation"]] = (
            1e3 * entry["stats"]["median"] / info.get("calls", 1)
        )
    info = report["benchmarks"][0]["extra_info"]
    columns = sorted({name for times in rows.values() for name in times})
    lines = [
        f"`{info['operator']}`, median ms on a CPU ({report['machine_info']['cpu']['brand_raw']}, "
        f"{info['threads']} threads, torch {info['torch']}):",
        "",
        f"| x | pass | dtype | {' | '.join(columns)} |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for key, times in rows.items():
        cells = [f"{times[c]:.2f}" if c in times else "–" for c in columns]
        lines.append(f"| {' | '.join([*key, *cells])} |")
    return "\n".join(lines)


def depthwise_sweep() -> str:
    """Least and median ratio of torch's time to ours, by pass and dtype, over the whole sweep."""
    path = RESULTS / "depthwise_conv2d_sweep.json"
    if not path.is_file():
        return "No sweep of `depthwise_conv2d` has been measured yet."
    report: dict[str, Any] = json.loads(path.read_text())
    ratios: dict[tuple[str, str], list[float]] = {}
    for point in report["points"]:
        ratios.setdefault((point["pass"], point["dtype"]), []).append(point["ratio"])
    sizes = {
        axis: ", ".join(map(str, sorted({point[axis] for point in report["points"]})))
        for axis in ("width", "kernel", "batch")
    }
    side = report["side"]
    lines = [
        f"`depthwise_conv2d` against torch eager, times faster, over D ∈ {{{sizes['width']}}}, "
        f"k ∈ {{{sizes['kernel']}}}, B ∈ {{{sizes['batch']}}} at {side}×{side} "
        f"({report['device']}, {report['instruction_set']}, {report['threads']} threads, "
        f"torch {report['torch']}):",
        "",
        "| pass | dtype | points | least | median | most |",
        "|---|---|---|---|---|---|",
    ]
    for (title, dtype), found in ratios.items():
        least, middle, most = min(found), statistics.median(found), max(found)
        lines.append(
            f"| {title} | {dtype} | {len(found)} | {least:.2f} | {middle:.2f} | {most:.2f} |"
        )
    return "\n".join(lines)


def memory() -> str:
    """Bytes kept for backward per image, beside what was predicted."""
    path = RESULTS / "memory.json"
    if not path.is_file():
        return "What training keeps in memory has not been measured yet."
    found: dict[str, Any] = json.loads(path.read_text())
    lines = [
        f"| kept for backward, bf16 autocast, {found['device']} | MB per image | predicted |",
        "|---|---|---|",
    ]
    for preset, sizes in found["presets"].items():
        kept, predicted = (sizes[k] / 1e6 for k in ("bytes_per_image", "predicted_bytes_per_image"))
        lines.append(f"| {preset} | {kept:,.0f} | {predicted:,.0f} |")
    return "\n".join(lines)


SECTIONS = {
    "operators": operators,
    "launches": launches,
    "demo result": demo_result,
    "benchmarks": benchmarks,
    "depthwise sweep": depthwise_sweep,
    "model": whole_model,
    "memory": memory,
    "ablation": ablation,
}


def render(readme: str) -> str:
    """The README's text with every generated section renewed."""
    for name, section in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(readme):
            raise ValueError(f"readme: has no section {name!r}")
        text = section()
        readme = pattern.sub(lambda match, t=text: f"{match[1]}{t}\n{match[2]}", readme)
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))
