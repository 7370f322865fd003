"""Time `td_layer_norm` with its residual add at the shapes of presets with norm "LN".

Each image has its own time. Bytes are counted as in `bench_td_rms_norm`.
"""

from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.ops.harness import Row, check_and_time, parametrize_rows
from dimr_fast.ops import td_layer_norm

PRESETS = {
    "M/3R transformer": (257, 768),
    "M/3R convolutions": (1024, 384),
    "M/3R highest": (4096, 192),
    "L/3R transformer": (257, 960),
}


def add_and_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    implementation: str,
) -> Any:
    return td_layer_norm(x, weight, bias, residual, implementation=implementation)


@parametrize_rows("td_layer_norm", PRESETS)
def test_td_layer_norm(benchmark: BenchmarkFixture, row: Row) -> None:
    check_and_time(
        benchmark,
        row,
        add_and_norm,
        lambda g: [
            torch.randn(row.shape, generator=g),
            torch.randn(row.shape, generator=g),
            torch.randn(row.shape[0], row.shape[-1], generator=g),
            torch.randn(row.shape[0], row.shape[-1], generator=g),
        ],
        bytes=(8 if row.backward else 4) * row.size * row.dtype.itemsize,
    )
