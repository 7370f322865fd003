"""Time `gated_gelu_fp8` at the presets' shapes.

Bytes per call for n = B·N·2·hidden input elements of e bytes: n·e are read, and n/2 written. Values
are compared, not their scales: tests compare both.
"""

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.ops.bench_gated_gelu import PRESETS
from benchmarks.ops.harness import Row, check_and_time, parametrize_rows
from dimr_fast.ops import gated_gelu_fp8


def gate(x: torch.Tensor, *, implementation: str) -> torch.Tensor:
    return gated_gelu_fp8(x, implementation=implementation).values


@parametrize_rows("gated_gelu_fp8", PRESETS, backward=[False])
def test_gated_gelu_fp8(benchmark: BenchmarkFixture, row: Row) -> None:
    check_and_time(
        benchmark,
        row,
        gate,
        lambda g: [torch.randn(row.shape, generator=g)],
        bytes=row.size * row.dtype.itemsize + row.size // 2,
    )
