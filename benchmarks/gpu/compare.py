"""Compare predicted kernel times with measured ones, for the GPU report.

`results/predictions.json` holds the predictions: a list of rows, or an object with the list under
"rows". A row names its "operator", "kernel", "x" and "pass", and states "floor µs" and
"predicted µs" per call.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.utils.files import RESULTS
from benchmarks.utils.names import BACKWARD, BF16, FORWARD, FORWARD_AND_BACKWARD

Row = Mapping[str, Any]
PREDICTIONS = RESULTS / "predictions.json"
OUR_IMPLEMENTATIONS = ("triton", "cuda")
SUMMED = ("floor µs", "predicted µs")
"""Columns that are summed over the kernels of a call."""


def compare(results: Mapping[str, Any], file: Path = PREDICTIONS) -> list[Row]:
    """Return a row for each predicted call, with all of its kernels; none without a file.

    If a backward pass was timed only together with its forward pass, the difference counts.
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
        for key in SUMMED:
            row[key] = sum(float(k[key]) for k in kernels if k.get(key) is not None)
        time = measured.get((operator, x, title))
        both, forward = (measured.get((operator, x, t)) for t in (FORWARD_AND_BACKWARD, FORWARD))
        if time is None and title == BACKWARD and both and forward:
            time = both - forward
        row["measured µs"] = time
        row["measured / predicted"] = (
            time / row["predicted µs"] if time and row["predicted µs"] else None
        )
        rows.append(row)
    return rows


def _measured(results: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
    """Return the µs of each call by the fastest of our implementations, in bf16."""
    found: dict[tuple[str, ...], float] = {}
    tables = results["sections"].get("operators", {}).get("tables", {})
    for row in tables.get("benchmarks", []):
        if row.get("dtype") == BF16 and row.get("implementation") in OUR_IMPLEMENTATIONS:
            call = _call(row)
            found[call] = min(1e3 * row["median ms"], found.get(call, float("inf")))
    return found


def _call(row: Row) -> tuple[str, ...]:
    """Return operator, shape and pass in one spelling: a shape may be a list or text."""
    x = row.get("x", "")
    numbers: Iterable[Any] = x if isinstance(x, list) else re.findall(r"\d+", str(x))
    title = re.sub(r"\s*\+\s*", " + ", str(row.get("pass", FORWARD)).strip().lower())
    return str(row.get("operator", "")), "×".join(map(str, numbers)), title
