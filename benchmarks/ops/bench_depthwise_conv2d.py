"""Time `depthwise_conv2d` with 7×7 kernels at the presets' shapes.

Passes: forward, the chain at the start of a block (convolution, residual add, `td_rms_norm`), input
gradient and weight gradient. Each takes k² multiply-adds per element of x. Forward and input
gradient read one tensor and write one; the weight gradient reads two; the chain writes the sum and
reads it again for the norm, unless both are fused.
"""

import itertools
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.ops.harness import COMPILE, DEVICES, Row, check_and_time, dtype_name
from dimr_fast.ops import OPERATORS, depthwise_conv2d, td_rms_norm

SHAPES = {
    "cpu": {"XL/2R": (4, 32, 32, 480), "XL/3R highest": (8, 64, 64, 240)},
    "cuda": {"XL/2R": (64, 32, 32, 480), "XL/3R highest": (64, 64, 64, 240)},
}
DTYPES = [torch.float32, torch.bfloat16]
KERNEL = 7
GRADIENT_OF = {"forward": None, "chain": None, "input gradient": (0,), "weight gradient": (1, 2)}
"""For each pass, the indices of the inputs whose gradient alone is timed; None: no gradient."""


def chain(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor,
    *,
    implementation: str,
) -> Any:
    """Run the start of a ConvNeXt block; the norm uses "auto", or else the reference."""
    norm = "reference" if implementation == "reference" else "auto"
    y = depthwise_conv2d(x, weight, bias, residual=True, implementation=implementation)
    return y, td_rms_norm(y, scale, implementation=norm)


def parameters() -> list[Any]:
    """Return a pytest parameter for each device, pass, dtype, provider and shape."""
    found = []
    providers = [*OPERATORS["depthwise_conv2d"].names, COMPILE]
    for device, title, dtype, provider in itertools.product(
        DEVICES, GRADIENT_OF, DTYPES, providers
    ):
        for preset, shape in SHAPES[device].items():
            row = Row("depthwise_conv2d", provider, preset, shape, dtype, device, False)
            label = "-".join([device, preset, dtype_name(dtype), title, provider])
            found.append(pytest.param(row, title, id=label.replace(" ", "_")))
    return found


@pytest.mark.parametrize(("row", "title"), parameters())
def test_depthwise_conv2d(benchmark: BenchmarkFixture, row: Row, title: str) -> None:
    d = row.shape[-1]
    sizes: list[tuple[int, ...]] = [row.shape, (d, 1, KERNEL, KERNEL), (d,)]
    if title == "chain":
        sizes.append((row.shape[0], d))
    check_and_time(
        benchmark,
        row,
        chain if title == "chain" else depthwise_conv2d,
        lambda g: [torch.randn(size, generator=g) for size in sizes],
        gradient_of=GRADIENT_OF[title],
        title=title,
        flops=2 * KERNEL**2 * row.size,
        bytes=(4 if title == "chain" else 2) * row.size * row.dtype.itemsize,
    )
