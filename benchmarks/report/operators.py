"""Tables of single operators, and of counted launches and memory."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.report.results import machine_line
from benchmarks.utils import machine
from benchmarks.utils.files import RESULTS
from benchmarks.utils.markdown import table
from dimr_fast import DiMR
from dimr_fast.ops import OPERATORS


def implementations() -> str:
    """Return the implementations of each operator, from the registry."""
    names = sorted({n for o in OPERATORS.values() for n in o.names} - {"reference"})
    return table(
        {"operator": f"`{name}`"}
        | {n: "yes" if n in operator.names else None for n in [*names, "reference"]}
        for name, operator in sorted(OPERATORS.items())
    )


def operator_tables(folder: Path = RESULTS) -> str:
    """Return a table for each operator and machine, without the whole model's."""
    files = sorted([*folder.glob("*_cpu.json"), *folder.glob("*_gpu.json")])
    files = [file for file in files if not file.name.startswith("model_")]
    return "\n\n".join(operator_table(json.loads(file.read_text())) for file in files)


def operator_table(report: Mapping[str, Any]) -> str:
    """Return the median times of a pytest-benchmark file by shape, pass and dtype."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for entry in report["benchmarks"]:
        info = entry["extra_info"]
        if info.get("interpreted"):
            continue
        key = ("×".join(map(str, info["shape"])), info["pass"], info["dtype"])
        milliseconds = 1e3 * entry["stats"]["median"] / info.get("calls", 1)
        rows.setdefault(key, {})[info["implementation"]] = f"{milliseconds:.2f}"
    providers = sorted({provider for times in rows.values() for provider in times})
    operator = report["benchmarks"][0]["extra_info"]["operator"]
    lines = [
        dict(zip(("x", "pass", "dtype"), key, strict=True)) | {p: times.get(p) for p in providers}
        for key, times in rows.items()
    ]
    return f"`{operator}`, median ms ({machine_line(report)}):\n\n{table(lines)}"


def sweep_table(report: Mapping[str, Any]) -> str:
    """Return the speedups of the depthwise sweep by pass and dtype."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for point in report["points"]:
        ratios.setdefault((point["pass"], point["dtype"]), []).append(point["ratio"])
    sizes = {
        axis: ", ".join(map(str, sorted({point[axis] for point in report["points"]})))
        for axis in ("width", "kernel", "batch")
    }
    side = report["side"]
    rows = [
        {
            "pass": title,
            "dtype": dtype,
            "points": len(found),
            "minimum": f"{min(found):.2f}",
            "median": f"{statistics.median(found):.2f}",
            "maximum": f"{max(found):.2f}",
        }
        for (title, dtype), found in ratios.items()
    ]
    return (
        f"Speedup (×) of `depthwise_conv2d` over eager torch, for D ∈ {{{sizes['width']}}}, "
        f"k ∈ {{{sizes['kernel']}}}, B ∈ {{{sizes['batch']}}} at {side}×{side} "
        f"({machine.summary(report)}, {report['instruction_set']}):\n\n"
        f"{table(rows)}"
    )


def launch_table(report: Mapping[str, Any]) -> str:
    """Return the counted launches of a forward pass at batch 1."""
    return table(
        {
            "launches per forward pass, batch 1": preset,
            "published": f"{counts['published']:,}",
            "plain PyTorch": f"{sum(counts['reference'].values()):,}",
            "Triton": f"{sum(counts['triton'].values()):,}",
        }
        for preset, counts in report["presets"].items()
    )


def memory_table(report: Mapping[str, Any]) -> str:
    """Return the bytes saved for the backward pass by setting of `checkpointing`."""
    title = f"saved for the backward pass, bf16 autocast ({machine.summary(report)})"
    return table(
        {
            title: preset,
            "MB per image": f"{1e-6 * sizes['bytes_per_image']:,.0f}",
            "predicted": f"{1e-6 * sizes['predicted_bytes_per_image']:,.0f}",
            '`checkpointing="selective"`': f"{1e-6 * sizes['selective_bytes_per_image']:,.0f}",
            "`checkpointing=True`": f"{1e-6 * sizes['checkpointed_bytes_per_image']:,.0f}",
        }
        for preset, sizes in report["presets"].items()
    )


IMAGES = 64
"""Images on a GPU in the published recipe."""
STATE_BYTES = 4 + 4 + 2 * 4 + 4 + 2
"""Bytes of a parameter: weight, gradient, AdamW's two moments and EMA in fp32, and a bf16 copy."""
SETTINGS = {
    "off": "bytes_per_image",
    '`"selective"`': "selective_bytes_per_image",
    "`True`": "checkpointed_bytes_per_image",
}


def training_memory_table(report: Mapping[str, Any]) -> str:
    """Return the memory of a published training step on a GPU by setting of `checkpointing`."""
    rows = []
    for name, sizes in report["presets"].items():
        with torch.device("meta"):
            parameters = sum(p.numel() for p in DiMR.from_preset(name).parameters())
        state = STATE_BYTES * parameters
        totals = {
            setting: 1e-9 * (state + IMAGES * sizes[key]) for setting, key in SETTINGS.items()
        }
        rows.append(
            {"GB on a GPU": name, "weights, gradients, AdamW, EMA": f"{1e-9 * state:.0f}"}
            | {
                f"all, with {IMAGES} images, checkpointing {setting}": f"{gb:.0f}"
                for setting, gb in totals.items()
            }
        )
    return (
        f"{table(rows)}\n\nCounted, not measured on a GPU: activations saved in bf16 autocast "
        f"([{machine.summary(report)}](../benchmarks/RESULTS.md#memory-of-a-training-step)) and "
        f"{STATE_BYTES} bytes for each parameter; buffers of single operations come on top."
    )


def prediction_table(report: Mapping[str, Any]) -> str:
    """Return the predicted kernel times, with the rates that they assume."""
    rates = ", ".join(f"{name} {value:g}" for name, value in report["assumptions"].items())
    columns = ("operator", "x", "pass", "kernel", "registers", "warps", "blocks a multiprocessor")
    rows = [
        {column: row.get(column) for column in columns}
        | {f"{bound}, µs": f"{row[f'{bound} us']:,.1f}" for bound in ("floor", "predicted")}
        | {"why": row["why"]}
        for row in report["rows"]
    ]
    return (
        f"For {report['target']}, compiled by Triton {report['triton']} at commit "
        f"{report['commit']:.9}. "
        f"Assumed rates: {rates}.\n\n{table(rows)}"
    )
