"""Benchmarks as sections of the GPU report: one pytest session, its rows, the files they go to."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_part import Part, Rows, rates, times
from gpu_render import write_whole


def run_benchmarks(
    part: Part, files: Sequence[Path], keywords: str, *, compiled: bool = False
) -> None:
    """Run the rows of benchmarks that `keywords`, an expression of pytest, selects.

    All in one session, so that imports and the GPU's context are paid for once. The results file of
    each benchmark keeps what else it had, and the section's table shows all of its rows, those of
    torch.compile or (`compiled` is False) the others.
    """
    chosen = f"({keywords}) and ({part.chosen})" if part.chosen else keywords
    arguments = [*files, "--benchmark-only", "-k", chosen]
    found = part.pytest(f"{part.name}: {chosen}", arguments)
    table: Rows = []
    for file in files:
        report = _kept(part, file, found.benchmarks)
        rows = benchmark_rows(report) if report else []
        table += [row for row in rows if ("compile" in row["implementation"]) == compiled]
    part.rows("benchmarks", table)
    reasons: dict[str, list[str]] = {}
    for entry in found.outcomes:
        if entry["outcome"] == "skipped":
            reasons.setdefault(entry["reason"], []).append(entry["test"].rpartition("::")[2])
    if reasons:
        part.rows(
            "rows without a time",
            [{"reason": reason, "rows": ", ".join(rows)} for reason, rows in reasons.items()],
        )


def _kept(part: Part, file: Path, report: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The results of `file` with those of its rows that `report` has anew, also on disk."""
    name = file.stem.removeprefix("bench_")
    kept = part.out / "benchmarks" / f"{name}_{'dry_run' if part.dry_run else 'gpu'}.json"
    earlier = json.loads(kept.read_text()) if kept.is_file() else None
    entries = (
        [e for e in report["benchmarks"] if f"/{file.name}::" in e["fullname"]] if report else []
    )
    if not entries:
        return earlier
    new = {entry["fullname"] for entry in entries}
    old = [e for e in (earlier or {}).get("benchmarks", []) if e["fullname"] not in new]
    whole = {**(report or {}), "benchmarks": old + entries}
    kept.parent.mkdir(exist_ok=True)
    write_whole(kept, json.dumps(whole, indent=1) + "\n")
    return whole


def benchmark_rows(report: Mapping[str, Any]) -> Rows:
    """A row for each benchmark of a pytest-benchmark file: what it says of itself, and times."""
    rows = []
    for entry in report["benchmarks"]:
        info = dict(entry["extra_info"])
        calls = info.pop("calls", 1)
        row = {k: v for k, v in info.items() if isinstance(v, str | int | float)}
        if "shape" in info:
            row["x"] = "×".join(map(str, info["shape"]))
        if "peak_bytes" in info:
            row["peak GB"] = 1e-9 * row.pop("peak_bytes")
        row |= times([1e3 * t / calls for t in entry["stats"]["data"]])
        row |= rates(row["median ms"], info.get("bytes", 0), info.get("flops", 0))
        rows.append({k: v for k, v in row.items() if k not in ("bytes", "flops")})
    return rows
