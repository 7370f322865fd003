"""Run benchmarks for the GPU report, and merge their rows into results files."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.section_run import Rows, SectionRun, rates, times
from benchmarks.utils.files import write_atomically


def is_compiled(provider: str) -> bool:
    """Return whether a provider is one of torch.compile."""
    return "compile" in provider


def run_benchmarks(
    section: SectionRun,
    files: Sequence[Path],
    keywords: str,
    *,
    shown: Callable[[str], bool] = lambda provider: not is_compiled(provider),
) -> None:
    """Run the rows of benchmark files that `keywords`, a pytest -k expression, selects.

    One pytest session runs all of them, so that imports and the GPU's context cost time only once.
    The results file of each benchmark keeps its other rows. The section's table shows the rows of
    the files whose provider is `shown`: by default, those without torch.compile.
    """
    chosen = f"({keywords}) and ({section.chosen})" if section.chosen else keywords
    arguments = [*files, "--benchmark-only", "-k", chosen]
    found = section.run_pytest(f"{section.name}: {chosen}", arguments)
    table: Rows = []
    for file in files:
        report = _merge(section, file, found.benchmarks)
        rows = benchmark_rows(report) if report else []
        table += [row for row in rows if shown(row["implementation"])]
    section.add_rows("benchmarks", table)
    reasons: dict[str, list[str]] = {}
    for entry in found.outcomes:
        if entry["outcome"] == "skipped":
            reasons.setdefault(entry["reason"], []).append(entry["test"].rpartition("::")[2])
    if reasons:
        section.add_rows(
            "rows without a time",
            [{"reason": reason, "rows": ", ".join(rows)} for reason, rows in reasons.items()],
        )


def _merge(
    section: SectionRun, file: Path, report: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """Write the results of `file`: the rows in `report`, and earlier ones that it lacks."""
    name = file.stem.removeprefix("bench_")
    results = section.out / "benchmarks" / f"{name}_{'dry_run' if section.dry_run else 'gpu'}.json"
    earlier = json.loads(results.read_text()) if results.is_file() else None
    entries = (
        [e for e in report["benchmarks"] if f"/{file.name}::" in e["fullname"]] if report else []
    )
    if not entries:
        return earlier
    new = {entry["fullname"] for entry in entries}
    old = [e for e in (earlier or {}).get("benchmarks", []) if e["fullname"] not in new]
    merged = {**(report or {}), "benchmarks": old + entries}
    results.parent.mkdir(exist_ok=True)
    write_atomically(results, json.dumps(merged, indent=1) + "\n")
    return merged


def benchmark_rows(report: Mapping[str, Any]) -> Rows:
    """Return a table row, with times and rates, for each benchmark of a pytest-benchmark file."""
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
