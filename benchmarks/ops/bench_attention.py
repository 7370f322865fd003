"""Time `attention` at the shapes of the presets, with each of its implementations.

Per image the matrix products take 4·N²·D FLOP forward and 10·N²·D backward. The forward pass reads
packed q, k and v and writes the output. The backward pass reads these, the output and its gradient,
and writes the gradient of q, k and v.
"""

from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.ops.harness import Row, check_and_time, parametrize_rows
from dimr_fast.ops import attention

PRESETS = {
    "demo": (65, 3 * 192),
    "XL/2R": (257, 3 * 960),
    "G/2R": (257, 3 * 1152),
    "M/3R": (257, 3 * 768),
}
HEADS = {"demo": 4, "XL/2R": 16, "G/2R": 16, "M/3R": 12}


@parametrize_rows("attention", PRESETS, dtypes=[torch.float32, torch.bfloat16], on_cpu=2)
def test_attention(benchmark: BenchmarkFixture, row: Row) -> None:
    def by_heads(qkv: torch.Tensor, *, implementation: str) -> Any:
        return attention(qkv, HEADS[row.preset], implementation=implementation)

    batch, tokens, width = row.shape
    check_and_time(
        benchmark,
        row,
        by_heads,
        lambda g: [torch.randn(row.shape, generator=g)],
        flops=(14 if row.backward else 4) * batch * tokens**2 * width // 3,
        bytes=(12 if row.backward else 4) * row.size * row.dtype.itemsize // 3,
    )
