"""Write the README's generated sections: `python benchmarks/readme.py`.

Operators come from the registry, figures from the files that the demo and the benchmarks wrote to
`benchmarks/results/`. `render` is what a test compares the README with.
"""

import json
import re
from pathlib import Path
from typing import Any

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


def depthwise_conv2d() -> str:
    """Median times of the forward, each shape and dtype, by implementation."""
    report = json.loads((RESULTS / "depthwise_conv2d_cpu.json").read_text())
    times: dict[tuple[str, str, str], float] = {}
    for entry in report["benchmarks"]:
        info = entry["extra_info"]
        shape = "×".join(map(str, info["shape"]))
        times[shape, info["dtype"], info["implementation"]] = 1e3 * entry["stats"]["median"]
    info = report["benchmarks"][0]["extra_info"]
    rows = [
        f"| {shape} | {dtype} | {times[shape, dtype, 'reference']:.2f} | {ours:.2f} |"
        for (shape, dtype, implementation), ours in times.items()
        if implementation == "cpu"
    ]
    title = (
        f"`depthwise_conv2d` forward, k = 7, median ms on a CPU with {info['threads']} threads, "
        f"torch {info['torch']}:"
    )
    head = ["| x | dtype | torch | ours |", "|---|---|---|---|"]
    return "\n".join([title, "", *head, *rows])


SECTIONS = {
    "operators": operators,
    "demo result": demo_result,
    "depthwise_conv2d": depthwise_conv2d,
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
