"""Paths of the checkout, and atomic writes."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
PLOTS = RESULTS / "plots"


def write_atomically(path: Path, text: str) -> None:
    """Replace the contents of `path`; a reader sees the old or the new text, never a part."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(text)
    os.replace(unfinished, path)
