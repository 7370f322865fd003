"""Forward of `depthwise_conv2d`, k = 7, at the presets' and the demo's shapes.

A call multiplies and adds k² times per output element, and reads x and writes y once.
"""

import pytest
import torch
from harness import DEVICES, check_close, describe, name, usable
from pytest_benchmark.fixture import BenchmarkFixture

from dimr_fast.ops import depthwise_conv2d

SHAPES = [(4, 32, 32, 480), (8, 32, 32, 48)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNEL = 7


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("implementation", ["reference", "cpu", "cuda"])
def test_forward(
    benchmark: BenchmarkFixture,
    implementation: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(size, generator=generator).to(device, dtype)
        for size in (shape, (shape[-1], 1, KERNEL, KERNEL), shape[-1:])
    ]
    x = inputs[0]
    usable("depthwise_conv2d", implementation, x)

    def call() -> torch.Tensor:
        y = depthwise_conv2d(*inputs, implementation=implementation)
        if device == "cuda":
            torch.cuda.synchronize()
        return y

    reference = depthwise_conv2d(*inputs, implementation="reference")
    exact = depthwise_conv2d(*(t.double() for t in inputs), implementation="reference")
    check_close(call(), reference, exact)
    benchmark.extra_info |= describe("depthwise_conv2d", implementation, x) | {
        "pass": "forward",
        "flops": 2 * KERNEL**2 * x.numel(),
        "bytes": 2 * x.numel() * x.element_size(),
    }
    with torch.inference_mode():
        benchmark.pedantic(call, rounds=30, warmup_rounds=3)
