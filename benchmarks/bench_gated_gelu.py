"""`gated_gelu` at the presets' shapes.

Bytes of a call, for n = B·N·2·hidden inputs of e bytes: forward reads them and writes half as many,
1.5·n·e; backward reads input and gradient and writes the merged gradient, 2.5·n·e more.
"""

import torch
from harness import Row, compare, rows
from pytest_benchmark.fixture import BenchmarkFixture

from dimr_fast.ops import gated_gelu

PRESETS = {
    "XL/2R transformer": (257, 3840),
    "XL/2R convolutions": (1024, 1920),
    "G/2R transformer": (257, 4608),
    "G/2R convolutions": (1024, 2304),
    "XL/3R highest": (4096, 960),
}


@rows("gated_gelu", PRESETS)
def test_gated_gelu(benchmark: BenchmarkFixture, row: Row) -> None:
    compare(
        benchmark,
        row,
        gated_gelu,
        lambda g: [torch.randn(row.shape, generator=g)],
        bytes=(8 if row.backward else 3) * row.size * row.dtype.itemsize // 2,
    )
