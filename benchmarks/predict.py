"""Predict the kernels' times on an H100 from their compiled code: `python benchmarks/predict.py`.

`predict_cases.py` lists launches; each is compiled ahead of time for sm_90 as its launcher launches
it (`tests/aot.py`). Of the resources that a launch shares, the slowest counts:

- memory: each input and output moves once, and again what has left the L2 cache by its second use;
- L2: those bytes, and what programs read from the L2 cache;
- instructions: all warps', one a scheduler and clock; a loop's count as often as the launcher's
  constants say, code that a branch skips counts in full;
- special functions (exp2, reciprocals, …): 16 a multiprocessor and clock;
- products: their FLOP at the full rate of the tensor cores.

Beside them stands the latency of programs: one waits once for as many loads as half its registers
hold, not for asynchronous copies, and its warps issue an instruction every few clocks; programs
take turns in the places that registers, shared memory and warps leave them. Neither hides the other
wholly: the prediction is the root of the sum of both squares. Where programs are more than places,
the last one runs alone; the start of each kernel comes on top.

The rates are assumptions, written beside the results: this project has measured nothing on a GPU.
Caches and schedulers are not simulated, so a prediction is good for which resource binds, and for
comparing two versions of a kernel; it may be off by a third.

Writes `results/predictions.json` and the table in `predictions.md`.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dimr_fast.utils.files import write_json

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "predictions.json"
PAGE = ROOT / "benchmarks" / "predictions.md"

ASSUMPTIONS: dict[str, float] = {
    "multiprocessors": 132,
    "registers a multiprocessor": 65536,
    "warps a multiprocessor": 64,
    "blocks a multiprocessor": 32,
    "shared KB a multiprocessor": 227,
    "clock GHz": 1.7,
    "memory TB/s": 3.0,
    "L2 TB/s": 5.5,
    # Of 50 MB: each half of the cache keeps copies of the other's lines.
    "L2 MB that keep rows": 25,
    "products TFLOP/s": 798,
    "latency us": 0.8,
    "clocks from an instruction to the next of its warp": 2,
    "launch us": 2.0,
}
Row = dict[str, Any]


def aot_launches() -> list[Any]:
    """The launches of the cases, as `tests/aot.py` asks for them."""
    from aot import Launch
    from predict_cases import cases

    return [Launch(case.name, case.call) for case in cases()]


def compiled() -> dict[str, list[Row]]:
    """What each case's kernels compile to for sm_90, in a process where Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT / "benchmarks"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "compiled.json"
        command = [sys.executable, ROOT / "tests" / "aot.py", "predict", output]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"compiling ahead of time failed:\n{done.stdout}{done.stderr}")
        kernels: list[Row] = json.loads(output.read_text())
    # Constants tuned on an H100, where there are some, and otherwise the default ones.
    files = {kernel["configurations"] for kernel in kernels}
    chosen = next((file for file in sorted(files) if "H100" in file), "default")
    found: dict[str, list[Row]] = {}
    for kernel in kernels:
        if kernel["configurations"] == chosen:
            found.setdefault(kernel["launch"], []).append(kernel)
    return found


def resident(kernel: Mapping[str, Any]) -> int:
    """Programs that a multiprocessor has room for."""
    a, warps = ASSUMPTIONS, kernel["warps"]
    registers = 32 * warps * -(-kernel["registers"] // 8) * 8
    return int(
        min(
            a["registers a multiprocessor"] // registers,
            a["warps a multiprocessor"] // warps,
            a["shared KB a multiprocessor"] * 1024 // (kernel["shared"] + 1024),
            a["blocks a multiprocessor"],
        )
    )


def _executed(kernel: Mapping[str, Any], trips: Any, opcode: str = "") -> float:
    """Instructions of a warp whose opcode begins so."""

    def count(opcodes: Mapping[str, int]) -> int:
        return sum(n for name, n in opcodes.items() if name.startswith(opcode))

    return count(kernel["opcodes"]) + sum(
        (trip - 1) * count(loop) for trip, loop in zip(trips, kernel["loops"], strict=True)
    )


def _waits(kernel: Mapping[str, Any], trips: Any) -> float:
    """How often a program waits for loads."""

    def count(opcodes: Mapping[str, int]) -> int:
        wide = {"64": 2, "128": 4}
        loads = (name for name in opcodes if name.startswith("LDG."))
        loaded = sum(opcodes[name] * wide.get(name.split(".")[-1], 1) for name in loads)
        return -(-2 * loaded // kernel["registers"])

    outside = Counter(kernel["opcodes"])
    for loop in kernel["loops"]:
        outside.subtract(loop)
    loops = zip(trips, kernel["loops"], strict=True)
    return count(outside) + sum(trip * count(loop) for trip, loop in loops)


def predict(kernel: Mapping[str, Any], programs: int, work: Any) -> Row:
    """The facts of a launch and the time it is predicted to take."""
    if len(work.trips) != len(kernel["loops"]):
        raise ValueError(
            f"trips: got {len(work.trips)} for {kernel['kernel']}, expected {len(kernel['loops'])}"
        )
    a, blocks = ASSUMPTIONS, resident(kernel)
    clock, places = 1e3 * a["clock GHz"], blocks * a["multiprocessors"]
    instructions = _executed(kernel, work.trips)
    warps = programs * kernel["warps"]
    in_flight = min(programs, places) * work.held
    kept = min(1.0, 1e6 * a["L2 MB that keep rows"] / in_flight) if in_flight else 1.0
    moved = work.bytes + (1 - kept) * work.again
    waits = _waits(kernel, work.trips)
    gap = a["clocks from an instruction to the next of its warp"] / clock
    program = waits * a["latency us"] + instructions * gap
    cached = work.bytes + work.again + work.cached
    special = warps * 32 * _executed(kernel, work.trips, "MUFU")
    terms = {
        f"memory: {1e-6 * moved:,.0f} MB": moved / (1e6 * a["memory TB/s"]),
        f"L2: {1e-6 * cached:,.0f} MB": cached / (1e6 * a["L2 TB/s"]),
        f"instructions: {instructions:,.0f} a warp": (
            warps * instructions / (a["multiprocessors"] * 4 * clock)
        ),
        "special functions": special / (a["multiprocessors"] * 16 * clock),
        f"products: {1e-9 * work.flops:,.0f} GFLOP": work.flops / (1e6 * a["products TFLOP/s"]),
    }
    shared = max(terms.values())
    turns = max(1.0, programs / places)
    latency = turns * program
    terms[f"latency: {waits:,.0f} waits of {turns:.1f} programs in turn"] = latency
    why = max(terms, key=lambda term: terms[term])
    alone = program if programs > places else 0.0
    floor = max(work.bytes / (1e6 * a["memory TB/s"]), work.flops / (1e6 * a["products TFLOP/s"]))
    return {
        "registers": kernel["registers"],
        "shared": kernel["shared"],
        "warps": kernel["warps"],
        "programs": programs,
        "blocks a multiprocessor": blocks,
        "floor us": round(floor, 1),
        "predicted us": round(math.hypot(shared, latency) + alone + a["launch us"], 1),
        "why": why,
    }


def rows() -> list[Row]:
    """A row a launch, and one of all where a pass has several, or a benchmark times both passes."""
    from predict_cases import cases

    kernels = compiled()
    found: list[Row] = []
    forward: Row = {}
    for case in cases():
        about = {"operator": case.operator, "case": case.case, "x": "×".join(map(str, case.x))}
        work = {name: iter(launches) for name, launches in case.work.items()}
        parts = [
            about
            | {"kernel": kernel["kernel"], "pass": case.direction}
            | predict(kernel, programs, next(work[kernel["kernel"]]))
            for kernel in kernels[case.name]
            for programs in kernel["grids"]
        ]
        if case.products:
            us = round(case.products / (1e6 * ASSUMPTIONS["products TFLOP/s"]), 1)
            why = f"products: {1e-9 * case.products:,.0f} GFLOP"
            product = {"kernel": "products", "pass": case.direction, "floor us": us}
            parts.append(about | product | {"predicted us": us, "why": why})
        whole = about | {"pass": case.direction} | _sum(parts)
        if len(parts) > 1:
            for part in parts:
                part["pass"] += ", part"
            parts.append(whole)
        found += parts
        if case.direction.startswith("forward"):
            forward = whole
        else:
            both = case.direction.replace("backward", "forward + backward")
            found.append(about | {"pass": both} | _sum([forward, whole]))
    return found


def _sum(parts: list[Row]) -> Row:
    longest = max(parts, key=lambda part: part["predicted us"])
    us = {key: round(sum(part[key] for part in parts), 1) for key in ("floor us", "predicted us")}
    return {"kernel": "all", **us, "why": f"most: {longest['kernel']}, {longest['pass']}"}


def report() -> Row:
    import torch
    import triton

    revision = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(revision, cwd=ROOT, capture_output=True, text=True)
    return {
        "target": "sm_90",
        "triton": triton.__version__,
        "torch": torch.__version__,
        "commit": done.stdout.strip() or "unknown",
        "assumptions": ASSUMPTIONS,
        "rows": rows(),
    }


COLUMNS = (
    "operator",
    "x",
    "pass",
    "kernel",
    "registers",
    "warps",
    "blocks a multiprocessor",
    "floor us",
    "predicted us",
    "why",
)


def table(found: Row) -> str:
    """The predictions as Markdown."""
    rates = ", ".join(f"{name} {value:g}" for name, value in found["assumptions"].items())
    titles = [column.replace(" us", ", µs") for column in COLUMNS]
    lines = [
        f"For {found['target']}, compiled by Triton {found['triton']}; assumed: {rates}.",
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for row in found["rows"]:
        lines.append(f"| {' | '.join(str(row.get(column, '–')) for column in COLUMNS)} |")
    return "\n".join(lines)


def render(page: str) -> str:
    """The page's text with the table renewed from the results."""
    text = table(json.loads(RESULT.read_text()))
    pattern = re.compile(r"(<!-- predictions -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError("page: has no section 'predictions'")
    return pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page)


if __name__ == "__main__":
    write_json(RESULT, report())
    PAGE.write_text(render(PAGE.read_text()))
