"""Time `td_parameters`: all time-dependent parameters of a preset, one time per image.

Bytes per call in fp32 for P parameters and T times: forward reads four vectors and writes T values
for each parameter, (4 + T)·P·4; backward reads these and writes four gradients, (8 + T)·P·4 more.
"""

from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.ops.harness import Row, check_and_time, parametrize_rows
from dimr_fast import DiMR
from dimr_fast.layers import TDParameter
from dimr_fast.ops import td_parameters

PRESETS: dict[str, tuple[int, ...]] = dict.fromkeys(
    ["demo", "DiMR-XL/2R", "DiMR-G/2R", "DiMR-XL/3R"], ()
)


@parametrize_rows("td_parameters", PRESETS, dtypes=[torch.float32])
def test_td_parameters(benchmark: BenchmarkFixture, row: Row) -> None:
    with torch.device("meta"):
        model = DiMR.from_preset(row.preset)
    widths = [len(m.param0) for m in model.modules() if isinstance(m, TDParameter)]
    (times,) = row.shape
    tau = torch.linspace(-1, 1, times, device=row.device)

    def all_parameters(*vectors: torch.Tensor, implementation: str) -> Any:
        parameters = zip(*[iter(vectors)] * 4, strict=True)
        return td_parameters(
            tau.to(vectors[0].dtype), list(parameters), implementation=implementation
        )

    columns = sum(widths)
    check_and_time(
        benchmark,
        row,
        all_parameters,
        lambda g: [torch.randn(width, generator=g) for width in widths for _ in range(4)],
        bytes=4 * columns * (12 + 2 * times if row.backward else 4 + times),
    )
