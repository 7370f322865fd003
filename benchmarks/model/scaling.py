"""Measure how time grows with batch, depth and image size.

    python -m benchmarks.model.scaling

times a model like the demo's, optimised for a forward pass and plain for a training step, fits a
power of the size to the medians (least squares of logarithms) and writes `results/scaling.json`.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.utils import machine
from benchmarks.utils.files import RESULTS
from dimr_fast import PRESETS, DiMR, DiMRConfig, optimize_for_inference
from dimr_fast.diffusion import multi_scale_loss
from dimr_fast.optim import adamw
from dimr_fast.utils.device import keep_freed_memory, resolve_device
from dimr_fast.utils.files import write_json

RESULT = RESULTS / "scaling.json"
BATCH = 8
DTYPE = torch.bfloat16
ROUNDS = 9


def deeper(config: DiMRConfig, factor: int) -> DiMRConfig:
    """Return a configuration with `factor` times as many blocks.

    A branch has one block more than twice `num_blocks // 2`.
    """
    branches = (
        dataclasses.replace(b, num_blocks=factor * (2 * (b.num_blocks // 2) + 1))
        for b in config.stage_configs
    )
    return dataclasses.replace(config, stage_configs=tuple(branches))


def larger(config: DiMRConfig, side: int) -> DiMRConfig:
    """Return a configuration for square images with `side` pixels a side."""
    factor = side / config.image_size[0]
    branches = (
        dataclasses.replace(
            b, max_height=int(b.max_height * factor), max_width=int(b.max_width * factor)
        )
        for b in config.stage_configs
    )
    return dataclasses.replace(config, stage_configs=tuple(branches))


def measure(config: DiMRConfig, batch: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of a forward pass and of a training step."""
    torch.manual_seed(0)
    model = DiMR(config).to(device)
    x = torch.randn(batch, config.channels, *config.image_size, device=device)
    log_snr = torch.linspace(-4, 4, batch, device=device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)
    optimized, optimizer = optimize_for_inference(model, DTYPE), adamw(model, 1e-4)

    def step() -> None:
        with torch.autocast(device.type, DTYPE):
            predictions = model(x, log_snr=log_snr, y=y)
        optimizer.zero_grad()
        multi_scale_loss(predictions, x).mean().backward()
        optimizer.step()

    return {
        "forward": seconds(lambda: optimized(x, log_snr=log_snr, y=y), device),
        "training step": seconds(step, device),
    }


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of a call, after two warm-up calls."""
    found = []
    for _ in range(2 + ROUNDS):
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begun)
    return statistics.median(found[2:])


def fit(sizes: list[int], times: list[float]) -> dict[str, Any]:
    """Fit `factor · size ** exponent` to the times."""
    slope, intercept = statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(t) for t in times]
    )
    return {
        "sizes": sizes,
        "seconds": times,
        "exponent": slope,
        "factor": math.exp(intercept),
    }


def report(device: torch.device) -> dict[str, Any]:
    """Measure every size along each axis, and fit a power to each."""
    demo = PRESETS["demo"]
    axes = {
        "batch": {size: (demo, size) for size in (1, 2, 4, 8, 16, 32, 64)},
        "depth factor": {size: (deeper(demo, size), BATCH) for size in (1, 2, 4, 8)},
        "image side": {size: (larger(demo, size), BATCH) for size in (16, 32, 64, 128)},
    }
    found: dict[str, Any] = {}
    for name, points in axes.items():
        measured = {size: measure(*point, device) for size, point in points.items()}
        found[name] = {
            title: fit(list(measured), [times[title] for times in measured.values()])
            for title in ("forward", "training step")
        }
    return {
        **machine.description(),
        "dtype": str(DTYPE).removeprefix("torch."),
        "axes": found,
    }


if __name__ == "__main__":
    keep_freed_memory()
    write_json(RESULT, report(resolve_device("auto")))
