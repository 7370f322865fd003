"""`td_layer_norm` with its residual add at the M/3R preset's shapes ("LN"), a time per image.

Bytes of a call as `bench_td_rms_norm` says. Without a residual it is the head's norm.
"""

from typing import Any

import torch
from harness import Row, compare, rows
from pytest_benchmark.fixture import BenchmarkFixture

from dimr_fast.ops import td_layer_norm

PRESETS = {
    "M/3R transformer": (257, 768),
    "M/3R convolutions": (1024, 384),
    "M/3R highest": (4096, 192),
    "L/3R transformer": (257, 960),
}


def after_residual(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    implementation: str,
) -> Any:
    return td_layer_norm(x, weight, bias, residual, implementation=implementation)


@rows("td_layer_norm", PRESETS)
def test_td_layer_norm(benchmark: BenchmarkFixture, row: Row) -> None:
    compare(
        benchmark,
        row,
        after_residual,
        lambda g: [
            torch.randn(row.shape, generator=g),
            torch.randn(row.shape, generator=g),
            torch.randn(row.shape[0], row.shape[-1], generator=g),
            torch.randn(row.shape[0], row.shape[-1], generator=g),
        ],
        bytes=(8 if row.backward else 4) * row.size * row.dtype.itemsize,
    )
