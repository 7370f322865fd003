"""Time `td_layer_norm_fp8` with its residual add at the presets' shapes; images share one time.

Bytes per call for n = B·N·D elements of e bytes: x, the residual and the sum are 3·n·e, the values
n. Values are compared, not their scales: tests compare both.
"""

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.ops.bench_td_layer_norm import PRESETS
from benchmarks.ops.harness import Row, check_and_time, parametrize_rows
from dimr_fast.ops import td_layer_norm_fp8


def add_and_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    summed, rows = td_layer_norm_fp8(x, weight, bias, residual, implementation=implementation)
    return summed, rows.values


@parametrize_rows("td_layer_norm_fp8", PRESETS, backward=[False])
def test_td_layer_norm_fp8(benchmark: BenchmarkFixture, row: Row) -> None:
    check_and_time(
        benchmark,
        row,
        add_and_norm,
        lambda g: [
            torch.randn(row.shape, generator=g),
            torch.randn(row.shape, generator=g),
            torch.randn(1, row.shape[-1], generator=g),
            torch.randn(1, row.shape[-1], generator=g),
        ],
        bytes=row.size * (3 * row.dtype.itemsize + 1),
    )
