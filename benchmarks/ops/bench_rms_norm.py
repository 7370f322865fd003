"""Time `rms_norm` with its residual add at XL/2R's shapes.

Bytes are counted as in `bench_td_rms_norm`.
"""

from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.ops.harness import Row, check_and_time, parametrize_rows
from dimr_fast.ops import rms_norm

PRESETS = {"XL/2R transformer": (257, 960), "XL/2R convolutions": (1024, 480)}


def add_and_norm(
    x: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor, *, implementation: str
) -> Any:
    return rms_norm(x, scale, residual, implementation=implementation)


@parametrize_rows("rms_norm", PRESETS)
def test_rms_norm(benchmark: BenchmarkFixture, row: Row) -> None:
    check_and_time(
        benchmark,
        row,
        add_and_norm,
        lambda g: [
            torch.randn(row.shape, generator=g),
            torch.randn(row.shape, generator=g),
            torch.randn(row.shape[-1], generator=g),
        ],
        bytes=(8 if row.backward else 4) * row.size * row.dtype.itemsize,
    )
