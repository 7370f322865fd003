"""Time `upsample_add`: the cascade from the S features of one branch to the next branch.

FLOP count the projection: 2·B·h·w·S·d·D·q² forward and twice that backward. Bytes per forward call
for f feature, p projected and x embedding elements of e bytes: (3·f + 2·p + 2·x)·e, since features
are read, normalised features and projections are written and read, and the embedding is read and
written.
"""

from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.ops.harness import Row, check_and_time, parametrize_rows
from dimr_fast.config import preset
from dimr_fast.ops import upsample_add

CASCADES = {"demo": 0, "DiMR-XL/2R": 0, "DiMR-G/2R": 0, "DiMR-XL/3R": 1}
"""For each preset, the index of the branch whose features are upsampled."""


def _embedding(name: str, index: int) -> tuple[int, int, int]:
    """Return height, width and channels of the branch after `index`."""
    high = preset(name).stage_configs[index + 1]
    return high.max_height, high.max_width, high.dim


@parametrize_rows(
    "upsample_add", {name: _embedding(name, i) for name, i in CASCADES.items()}, gpu_batch=32
)
def test_upsample_add(benchmark: BenchmarkFixture, row: Row) -> None:
    low = preset(row.preset).stage_configs[CASCADES[row.preset]]
    batch, height, _, dim = row.shape
    count = 2 * (low.num_blocks // 2) + 2
    q = height // low.max_height
    channels, projected = count * low.dim, dim * q * q

    def cascade(x: torch.Tensor, *rest: torch.Tensor, implementation: str) -> Any:
        features, (scale_in, shift_in, weight, bias, scale_out, shift_out) = (
            rest[:count],
            rest[count:],
        )
        return upsample_add(
            x,
            features,
            (scale_in, shift_in),
            weight,
            bias,
            (scale_out, shift_out),
            implementation=implementation,
        )

    positions = batch * low.max_height * low.max_width
    moved = 3 * positions * channels + 2 * positions * projected + 2 * row.size
    check_and_time(
        benchmark,
        row,
        cascade,
        lambda g: [
            torch.randn(row.shape, generator=g),
            *(
                torch.randn(batch, low.max_height, low.max_width, low.dim, generator=g)
                for _ in range(count)
            ),
            torch.randn(batch, channels, generator=g),
            torch.randn(batch, channels, generator=g),
            torch.randn(projected, channels, generator=g) / channels**0.5,
            torch.randn(projected, generator=g),
            torch.randn(batch, dim, generator=g),
            torch.randn(batch, dim, generator=g),
        ],
        flops=(6 if row.backward else 2) * positions * channels * projected,
        **({} if row.backward else {"bytes": moved * row.dtype.itemsize}),
    )
