"""Time `gated_gelu` at the presets' shapes.

Bytes per call for n = B·N·2·hidden input elements of e bytes: forward reads n and writes n/2, which
is 1.5·n·e; backward reads the input and the output's gradient and writes the input's gradient,
2.5·n·e more.
"""

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.ops.harness import Row, check_and_time, parametrize_rows
from dimr_fast.ops import gated_gelu

PRESETS = {
    "XL/2R transformer": (257, 3840),
    "XL/2R convolutions": (1024, 1920),
    "G/2R transformer": (257, 4608),
    "G/2R convolutions": (1024, 2304),
    "XL/3R highest": (4096, 960),
}


@parametrize_rows("gated_gelu", PRESETS)
def test_gated_gelu(benchmark: BenchmarkFixture, row: Row) -> None:
    check_and_time(
        benchmark,
        row,
        gated_gelu,
        lambda g: [torch.randn(row.shape, generator=g)],
        bytes=(8 if row.backward else 3) * row.size * row.dtype.itemsize // 2,
    )
