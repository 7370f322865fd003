"""`depthwise_conv2d` against torch over widths, kernels and batches: every pass, fp32 and bf16.

`python benchmarks/sweep_depthwise_conv2d.py` checks and times each point of the sweep, both sides
alternating in this one process, and writes `benchmarks/results/depthwise_conv2d_sweep.json`.
Ours is what "auto" chooses; torch's is the reference in eager mode, gradients by autograd on both
sides. `--quick` takes a few points and only prints.
"""

import argparse
import datetime
import itertools
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness import check_close, name

from dimr_fast import _extension
from dimr_fast.ops import OPERATORS, depthwise_conv2d

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "results" / "depthwise_conv2d_sweep.json"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIDE = 32
WIDTHS, KERNELS, BATCHES = (8, 24, 96, 240, 480, 576), (3, 5, 7), (1, 4, 16)
DTYPES = (torch.float32, torch.bfloat16)
QUICK = [(8, 3, 1), (96, 5, 4), (240, 7, 1), (480, 7, 4)]
CHECKED = 8
"""Channels at either end of the width that are checked; a channel depends on no other."""

Call = Callable[[], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Pass:
    """What is timed: a call with or without the residual, or gradients of some of its inputs."""

    residual: bool = False
    gradient_of: tuple[int, ...] = ()

    def prepare(self, implementation: str, tensors: Sequence[torch.Tensor]) -> Call:
        """The call on x, weight, bias and the output's gradient."""
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
    """Every pass at a width, kernel and batch."""
    generator = torch.Generator().manual_seed(0)
    shape = (b, SIDE, SIDE, d)
    sizes = (shape, (d, 1, k, k), (d,), shape)
    tensors = [torch.randn(size, generator=generator).to(DEVICE, dtype) for size in sizes]
    found = []
    for title, one in PASSES.items():
        ours, theirs = (one.prepare(side, tensors) for side in ("auto", "reference"))
        try:
            check(one, tensors, ours(), theirs())
        except AssertionError as error:
            at = f"{title}, {name(dtype)}, D={d} k={k} B={b}"
            raise AssertionError(f"{at}: not as accurate as torch, so not timed") from error
        times = alternate(ours, theirs, seconds)
        medians = [1e3 * statistics.median(side) for side in times]
        chosen = OPERATORS["depthwise_conv2d"].select("auto", tensors[0])
        point = {"pass": title, "dtype": name(dtype), "batch": b, "width": d, "kernel": k}
        point |= {"implementation": chosen, "ours_ms": medians[0], "torch_ms": medians[1]}
        found.append(point | {"ratio": medians[1] / medians[0], "repetitions": len(times[0])})
    return found


def check(
    one: Pass,
    tensors: Sequence[torch.Tensor],
    ours: Sequence[torch.Tensor],
    theirs: Sequence[torch.Tensor],
) -> None:
    """AssertionError where ours is not as accurate as torch's, by the rule of all benchmarks."""
    x, weight, bias, dy = tensors
    d = x.shape[-1]
    kept = sorted({*range(min(d, CHECKED)), *range(max(0, d - CHECKED), d)})
    part = [x[..., kept], weight[kept], bias[kept], dy[..., kept]]
    exact = one.prepare("reference", [t.double() for t in part])()
    image_like = one.gradient_of in ((), (0,))
    for our, their, truth in zip(ours, theirs, exact, strict=True):
        pair = [t[..., kept] if image_like else t[kept] for t in (our, their)]
        check_close(*pair, truth)


def alternate(ours: Call, theirs: Call, seconds: float) -> tuple[list[float], list[float]]:
    """Seconds of each call of either side: at least five, then as many as fit into `seconds`."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or (time.perf_counter() < end and len(times[0]) < 200):
        # Neither side is always the one that finds the other's data in the cache.
        for side, call in random.sample([(0, ours), (1, theirs)], 2):
            start = time.perf_counter()
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            times[side].append(time.perf_counter() - start)
    return times


def facts() -> dict[str, Any]:
    """Where and with what it was measured."""
    cpu_library = _extension.why_not("cpu")
    commit = _git("rev-parse", "HEAD")
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": cpu_library or _extension.instruction_set(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "built": _extension.build_facts(),
        "commit": commit + ("+" if _git("status", "--porcelain") else ""),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "side": SIDE,
        "passes": {title: asdict(one) for title, one in PASSES.items()},
    }


def _processor() -> str:
    from cpuinfo import get_cpu_info

    return str(get_cpu_info().get("brand_raw", platform.processor()))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seconds", type=float, default=0.25, help="of timing per point")
    parser.add_argument("--quick", action="store_true", help="a few points, written nowhere")
    options = parser.parse_args()
    sizes = QUICK if options.quick else list(itertools.product(WIDTHS, KERNELS, BATCHES))
    start = time.perf_counter()
    points: list[dict[str, Any]] = []
    for d, k, b in sizes:
        print(f"{time.perf_counter() - start:5.0f} s: D={d} k={k} B={b}", flush=True)
        for dtype in DTYPES:
            points += measure(d, k, b, dtype, options.seconds)
    print(f"{len(points)} points in {time.perf_counter() - start:.0f} s; the worst:")
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
