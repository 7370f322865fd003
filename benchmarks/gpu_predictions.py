"""What was predicted of a kernel's time, beside what was measured: a table of the GPU report.

The predictions are `results/predictions.json`: a list of rows, or an object that holds one under
"rows". A row names its "operator", "kernel", "x" and "pass", and says "floor µs" and
"predicted µs" of one call.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
FILE = Path(__file__).parent / "results" / "predictions.json"
OURS = ("triton", "cuda")
FORWARD, BOTH, BACKWARD = "forward", "forward + backward", "backward"
ADDED = ("floor µs", "predicted µs")
"""What kernels of one call have in common is told once, and these are added up."""


def compare(results: Mapping[str, Any], file: Path = FILE) -> list[Row]:
    """A row for each call that was predicted, all of its kernels together; none without a file.

    A backward pass that was only timed with its forward pass is the difference of the two.
    """
    if not file.is_file() or results["dry_run"]:
        return []
    found = json.loads(file.read_text())
    calls: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in found if isinstance(found, list) else found["rows"]:
        plain = {key.replace(" us", " µs"): value for key, value in row.items()}
        calls.setdefault(_call(plain), []).append(plain)
    measured = _measured(results)
    rows = []
    for (operator, x, title), kernels in calls.items():
        row = {
            "operator": operator,
            "x": x,
            "pass": title,
            "kernel": " + ".join(dict.fromkeys(str(k.get("kernel", "")) for k in kernels)),
        }
        for key in ADDED:
            row[key] = sum(float(k[key]) for k in kernels if k.get(key) is not None)
        time = measured.get((operator, x, title))
        both, forward = (measured.get((operator, x, t)) for t in (BOTH, FORWARD))
        if time is None and title == BACKWARD and both and forward:
            time = both - forward
        row["measured µs"] = time
        row["measured / predicted"] = (
            time / row["predicted µs"] if time and row["predicted µs"] else None
        )
        rows.append(row)
    return rows


def _measured(results: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
    """Microseconds of the fastest of our implementations of each call, in bf16."""
    found: dict[tuple[str, ...], float] = {}
    tables = results["sections"].get("operators", {}).get("tables", {})
    for row in tables.get("benchmarks", []):
        if row.get("dtype") == "bfloat16" and row.get("implementation") in OURS:
            call = _call(row)
            found[call] = min(1e3 * row["median ms"], found.get(call, float("inf")))
    return found


def _call(row: Row) -> tuple[str, ...]:
    """Operator, shape of its first input and pass, however they are spelt."""
    x = row.get("x", "")
    numbers: Iterable[Any] = x if isinstance(x, list) else re.findall(r"\d+", str(x))
    title = re.sub(r"\s*\+\s*", " + ", str(row.get("pass", FORWARD)).strip().lower())
    return str(row.get("operator", "")), "×".join(map(str, numbers)), title
