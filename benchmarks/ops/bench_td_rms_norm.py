"""Time `td_rms_norm` with its residual add at the presets' shapes; each image has its own time.

Bytes per call for n = B·N·D elements of e bytes: forward reads x and the residual and writes the
sum and the normalised sum, 4·n·e; backward reads the sum and two gradients and writes one, 4·n·e
more. Scales and statistics are negligible.
"""

from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.ops.harness import Row, check_and_time, parametrize_rows
from dimr_fast.ops import td_rms_norm

PRESETS = {
    "XL/2R transformer": (257, 960),
    "XL/2R convolutions": (1024, 480),
    "G/2R transformer": (257, 1152),
    "G/2R convolutions": (1024, 576),
    "XL/3R highest": (4096, 240),
}


def add_and_norm(
    x: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor, *, implementation: str
) -> Any:
    return td_rms_norm(x, scale, residual, implementation=implementation)


@parametrize_rows("td_rms_norm", PRESETS)
def test_td_rms_norm(benchmark: BenchmarkFixture, row: Row) -> None:
    check_and_time(
        benchmark,
        row,
        add_and_norm,
        lambda g: [
            torch.randn(row.shape, generator=g),
            torch.randn(row.shape, generator=g),
            torch.randn(row.shape[0], row.shape[-1], generator=g),
        ],
        bytes=(8 if row.backward else 4) * row.size * row.dtype.itemsize,
    )
