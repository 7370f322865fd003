"""`depthwise_conv2d`, k = 7, at the presets' shapes: forward, the chain of a block, both gradients.

A pass multiplies and adds k² times per element of x. Forward reads x and writes y, and so does the
input gradient; the weight gradient reads x and the output's gradient; the chain (convolution,
residual, `td_rms_norm`) writes the sum and reads it again for the norm, unless they are fused.
"""

import itertools
from typing import Any

import pytest
import torch
from harness import COMPILE, DEVICES, Row, compare, name
from pytest_benchmark.fixture import BenchmarkFixture

from dimr_fast.ops import OPERATORS, depthwise_conv2d, td_rms_norm

SHAPES = {
    "cpu": {"XL/2R": (4, 32, 32, 480), "XL/3R highest": (8, 64, 64, 240)},
    "cuda": {"XL/2R": (64, 32, 32, 480), "XL/3R highest": (64, 64, 64, 240)},
}
DTYPES = [torch.float32, torch.bfloat16]
KERNEL = 7
GRADIENT_OF = {"forward": None, "chain": None, "input gradient": (0,), "weight gradient": (1, 2)}
"""The passes, each with the inputs whose gradient alone is timed."""


def chain(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor,
    *,
    implementation: str,
) -> Any:
    """The start of a ConvNeXt block. The norm is the best there is, or the reference with it."""
    norm = "reference" if implementation == "reference" else "auto"
    y = depthwise_conv2d(x, weight, bias, residual=True, implementation=implementation)
    return y, td_rms_norm(y, scale, implementation=norm)


def passes() -> list[Any]:
    found = []
    providers = [*OPERATORS["depthwise_conv2d"].names, COMPILE]
    for device, title, dtype, provider in itertools.product(
        DEVICES, GRADIENT_OF, DTYPES, providers
    ):
        for preset, shape in SHAPES[device].items():
            row = Row("depthwise_conv2d", provider, preset, shape, dtype, device, False)
            label = "-".join([device, preset, name(dtype), title, provider])
            found.append(pytest.param(row, title, id=label.replace(" ", "_")))
    return found


@pytest.mark.parametrize(("row", "title"), passes())
def test_depthwise_conv2d(benchmark: BenchmarkFixture, row: Row, title: str) -> None:
    d = row.shape[-1]
    sizes: list[tuple[int, ...]] = [row.shape, (d, 1, KERNEL, KERNEL), (d,)]
    if title == "chain":
        sizes.append((row.shape[0], d))
    compare(
        benchmark,
        row,
        chain if title == "chain" else depthwise_conv2d,
        lambda g: [torch.randn(size, generator=g) for size in sizes],
        gradient_of=GRADIENT_OF[title],
        title=title,
        flops=2 * KERNEL**2 * row.size,
        bytes=(4 if title == "chain" else 2) * row.size * row.dtype.itemsize,
    )
