"""Compare `depthwise_conv2d` with torch over widths, kernel sizes and batches.

    python -m benchmarks.ops.sweep_depthwise_conv2d

checks and times every pass in fp32 and bf16 and writes `results/depthwise_conv2d_sweep.json`. Both
sides alternate in this one process: the implementation that "auto" chooses, and the reference in
eager mode; autograd computes the gradients of both. `--quick` measures a few points and writes no
file.
"""

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops.harness import check_close, dtype_name
from benchmarks.utils import machine
from benchmarks.utils.files import RESULTS
from dimr_fast import _extension
from dimr_fast.ops import OPERATORS, depthwise_conv2d

RESULT = RESULTS / "depthwise_conv2d_sweep.json"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIDE = 32
WIDTHS, KERNELS, BATCHES = (8, 24, 96, 240, 480, 576), (3, 5, 7), (1, 4, 16)
DTYPES = (torch.float32, torch.bfloat16)
QUICK = [(8, 3, 1), (96, 5, 4), (240, 7, 1), (480, 7, 4)]
CHECKED = 8
"""Channels checked at each end of the width; channels are independent of one another."""

Call = Callable[[], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Pass:
    """A timed pass: forward with or without the residual, or gradients of the inputs named."""

    residual: bool = False
    gradient_of: tuple[int, ...] = ()

    def prepare(self, implementation: str, tensors: Sequence[torch.Tensor]) -> Call:
        """Return the call on x, weight, bias and the output's gradient."""
        *given, dy = tensors

        def run(*inputs: torch.Tensor) -> torch.Tensor:
            return depthwise_conv2d(*inputs, residual=self.residual, implementation=implementation)

        if not self.gradient_of:

            def forward() -> Sequence[torch.Tensor]:
                with torch.inference_mode():
                    return (run(*given),)

            return forward
        leaves = [t.detach().requires_grad_(i in self.gradient_of) for i, t in enumerate(given)]
        wanted = [leaves[i] for i in self.gradient_of]
        y = run(*leaves)
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


PASSES = {
    "forward": Pass(),
    "forward with residual": Pass(residual=True),
    "input gradient": Pass(gradient_of=(0,)),
    "weight gradient": Pass(gradient_of=(1, 2)),
}


def measure(d: int, k: int, b: int, dtype: torch.dtype, seconds: float) -> list[dict[str, Any]]:
    """Check and time every pass at width `d`, kernel size `k` and batch `b`."""
    generator = torch.Generator().manual_seed(0)
    shape = (b, SIDE, SIDE, d)
    sizes = (shape, (d, 1, k, k), (d,), shape)
    tensors = [torch.randn(size, generator=generator).to(DEVICE, dtype) for size in sizes]
    found = []
    for title, timed in PASSES.items():
        ours, theirs = (timed.prepare(side, tensors) for side in ("auto", "reference"))
        try:
            check(timed, tensors, ours(), theirs())
        except AssertionError as error:
            at = f"{title}, {dtype_name(dtype)}, D={d} k={k} B={b}"
            raise AssertionError(f"{at}: not as accurate as torch, so not timed") from error
        times = alternate(ours, theirs, seconds)
        medians = [1e3 * statistics.median(side) for side in times]
        chosen = OPERATORS["depthwise_conv2d"].select("auto", tensors[0])
        point = {"pass": title, "dtype": dtype_name(dtype), "batch": b, "width": d, "kernel": k}
        point |= {"implementation": chosen, "ours_ms": medians[0], "torch_ms": medians[1]}
        found.append(point | {"ratio": medians[1] / medians[0], "repetitions": len(times[0])})
    return found


def check(
    timed: Pass,
    tensors: Sequence[torch.Tensor],
    ours: Sequence[torch.Tensor],
    theirs: Sequence[torch.Tensor],
) -> None:
    """Raise AssertionError if ours is less accurate than `check_close` allows."""
    x, weight, bias, dy = tensors
    d = x.shape[-1]
    kept = sorted({*range(min(d, CHECKED)), *range(max(0, d - CHECKED), d)})
    part = [x[..., kept], weight[kept], bias[kept], dy[..., kept]]
    exact = timed.prepare("reference", [t.double() for t in part])()
    image_like = timed.gradient_of in ((), (0,))
    for our, their, truth in zip(ours, theirs, exact, strict=True):
        pair = [t[..., kept] if image_like else t[kept] for t in (our, their)]
        check_close(*pair, truth)


def alternate(ours: Call, theirs: Call, seconds: float) -> tuple[list[float], list[float]]:
    """Return the seconds of each call of both sides: at least five, then as many as fit.

    The order within a pair is random, so that neither side always finds a warm cache.
    """
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or (time.perf_counter() < end and len(times[0]) < 200):
        for side, call in random.sample([(0, ours), (1, theirs)], 2):
            start = time.perf_counter()
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            times[side].append(time.perf_counter() - start)
    return times


def facts() -> dict[str, Any]:
    """Return machine, versions and settings of the sweep."""
    return machine.description() | {
        "instruction_set": _extension.why_not("cpu") or _extension.instruction_set(),
        "built": _extension.build_facts(),
        "side": SIDE,
        "passes": {title: asdict(timed) for title, timed in PASSES.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--seconds", type=float, default=0.25, help="timing per point")
    parser.add_argument("--quick", action="store_true", help="a few points, without a file")
    options = parser.parse_args()
    sizes = QUICK if options.quick else list(itertools.product(WIDTHS, KERNELS, BATCHES))
    start = time.perf_counter()
    points: list[dict[str, Any]] = []
    for d, k, b in sizes:
        print(f"{time.perf_counter() - start:5.0f} s: D={d} k={k} B={b}", flush=True)
        for dtype in DTYPES:
            points += measure(d, k, b, dtype, options.seconds)
    print(f"{len(points)} points in {time.perf_counter() - start:.0f} s; lowest ratios:")
    for point in sorted(points, key=lambda p: p["ratio"])[:12]:
        print(
            f"{point['ratio']:6.2f}x  {point['pass']:21}  {point['dtype']:8}  "
            f"B={point['batch']:<2} D={point['width']:<3} k={point['kernel']}  "
            f"{point['implementation']} {point['ours_ms']:.3f} ms, torch {point['torch_ms']:.3f}"
        )
    if not options.quick:
        options.out.write_text(json.dumps({**facts(), "points": points}, indent=1) + "\n")


if __name__ == "__main__":
    main()
