"""Predict the kernels' times on an H100 from their compiled code.

    python -m benchmarks.gpu.predict

writes `results/predictions.json`, from which `python -m benchmarks.report` renews the table in
predictions.md. `launch_cases.py` lists the launches; `tests/support/aot.py` compiles each for sm_90
as its launcher would. The slowest of these shared resources determines the time:

- memory: inputs and outputs move once, re-read data that has left the L2 cache moves again;
- L2: those bytes, and what programs read from the L2 cache;
- instructions of all warps, one per scheduler and clock; a loop counts as often as the launcher's
  constants say, and code that a branch may skip counts in full;
- special functions (exp2, reciprocals, …): 16 per multiprocessor and clock;
- products: their FLOP at the full rate of the tensor cores.

Latency is separate. A program waits once for as many loads as fit into half of its registers, not
for asynchronous copies, and its warps issue an instruction every few clocks. Registers, shared
memory and warps limit how many programs run at once; the others follow in turn. Since resources and
latency overlap only in part, the prediction is the root of the sum of their squares. If programs
run in turn, the last one runs alone; the time to start a kernel is added.

All rates are assumptions, written beside the results: nothing was measured on a GPU. Caches and
schedulers are not simulated. A prediction tells which resource is the limit, and compares two
versions of a kernel; it may be wrong by a third.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.utils import machine
from benchmarks.utils.files import RESULTS, ROOT
from benchmarks.utils.names import BACKWARD, FORWARD, FORWARD_AND_BACKWARD
from dimr_fast.utils.files import write_json

RESULT = RESULTS / "predictions.json"

ASSUMPTIONS: dict[str, float] = {
    "multiprocessors": 132,
    "registers a multiprocessor": 65536,
    "warps a multiprocessor": 64,
    "blocks a multiprocessor": 32,
    "shared KB a multiprocessor": 227,
    "clock GHz": 1.7,
    "memory TB/s": 3.0,
    "L2 TB/s": 5.5,
    # Half of 50 MB: each half of the cache copies lines of the other.
    "L2 MB that keep rows": 25,
    "products TFLOP/s": 798,
    "latency us": 0.8,
    "clocks from an instruction to the next of its warp": 2,
    "launch us": 2.0,
}
CASES = "benchmarks.gpu.launch_cases"
COMPILER = "tests.support.aot"
"""Module that compiles the launches of another module ahead of time, run as a program."""
Row = dict[str, Any]


def compiled() -> dict[str, list[Row]]:
    """Return each case's kernels as compiled for sm_90, in a process with a compiling Triton."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "compiled.json"
        command = [sys.executable, "-m", COMPILER, CASES, output]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"compiling ahead of time failed:\n{done.stdout}{done.stderr}")
        kernels: list[Row] = json.loads(output.read_text())
    # Configurations tuned on an H100 if there are any, else the default ones.
    files = {kernel["configurations"] for kernel in kernels}
    chosen = next((file for file in sorted(files) if "H100" in file), "default")
    found: dict[str, list[Row]] = {}
    for kernel in kernels:
        if kernel["configurations"] == chosen:
            found.setdefault(kernel["launch"], []).append(kernel)
    return found


def resident(kernel: Mapping[str, Any]) -> int:
    """Return how many programs run on a multiprocessor at once."""
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
    """Return how many instructions with this prefix of their opcode a warp executes."""

    def count(opcodes: Mapping[str, int]) -> int:
        return sum(n for name, n in opcodes.items() if name.startswith(opcode))

    return count(kernel["opcodes"]) + sum(
        (trip - 1) * count(loop) for trip, loop in zip(trips, kernel["loops"], strict=True)
    )


def _waits(kernel: Mapping[str, Any], trips: Any) -> float:
    """Return how often a program waits for loads."""

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
    """Return the facts of a launch and its predicted time.

    Raises ValueError if `work.trips` does not match the number of compiled loops.
    """
    if len(work.trips) != len(kernel["loops"]):
        raise ValueError(
            f"trips: got {len(work.trips)} for {kernel['kernel']}, expected {len(kernel['loops'])}"
        )
    a, blocks = ASSUMPTIONS, resident(kernel)
    clock, places = 1e3 * a["clock GHz"], blocks * a["multiprocessors"]
    instructions = _executed(kernel, work.trips)
    warps = programs * kernel["warps"]
    in_flight = min(programs, places) * work.reread_per_program
    kept = min(1.0, 1e6 * a["L2 MB that keep rows"] / in_flight) if in_flight else 1.0
    moved = work.bytes + (1 - kept) * work.reread
    waits = _waits(kernel, work.trips)
    gap = a["clocks from an instruction to the next of its warp"] / clock
    program = waits * a["latency us"] + instructions * gap
    cached = work.bytes + work.reread + work.cached
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
    """Return a row for each launch, and a row of sums for each pass and for both passes."""
    from benchmarks.gpu.launch_cases import cases

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
        if case.direction.startswith(FORWARD):
            forward = whole
        else:
            both = case.direction.replace(BACKWARD, FORWARD_AND_BACKWARD)
            found.append(about | {"pass": both} | _sum([forward, whole]))
    return found


def _sum(parts: list[Row]) -> Row:
    """Return the columns of a row that sums the times of others."""
    longest = max(parts, key=lambda part: part["predicted us"])
    us = {key: round(sum(part[key] for part in parts), 1) for key in ("floor us", "predicted us")}
    return {"kernel": "all", **us, "why": f"most: {longest['kernel']}, {longest['pass']}"}


def report() -> Row:
    """Return the contents of the results file."""
    import triton

    facts = machine.description()
    return {
        "target": "sm_90",
        "triton": triton.__version__,
        **{key: facts[key] for key in ("torch", "commit", "date")},
        "assumptions": ASSUMPTIONS,
        "rows": rows(),
    }


if __name__ == "__main__":
    write_json(RESULT, report())
