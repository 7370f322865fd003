"""FP8 rows, their matrix product, and where it can run."""

import pytest
import torch
import torch.nn.functional as F

from dimr_fast import ops, reference
from tests.support.fp8 import assert_nearest, dequantised
from tests.support.oracle import DEVICE, assert_as_accurate, seeded

needs_products = pytest.mark.skipif(
    ops.why_not_fp8(torch.device(DEVICE)) is not None,
    reason=f"FP8 products: {ops.why_not_fp8(torch.device(DEVICE))}",
)
SHAPES = [(257, 960, 2880), (33, 1920, 960), (1, 16, 16), (64, 64, 128)]


def rows_and_weight(m: int, k: int, n: int) -> tuple[ops.FP8Rows, ops.FP8Rows]:
    """Return rows of different sizes, as a transformer has them, and a weight."""
    x = seeded(m, k) * (1 + seeded(m).abs()[:, None])
    return ops.quantize_fp8(x), ops.quantize_fp8(seeded(n, k) / k**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_rounded_to_the_nearest_values(dtype: torch.dtype) -> None:
    x = seeded(3, 5, 64).to(dtype)
    assert_nearest(ops.quantize_fp8(x), x.double(), 1e-6 * x.double().abs())


def test_every_e4m3_value_is_its_own_nearest() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    values, scales = ops.quantize_fp8(every[None])
    assert scales.item() == 1
    assert torch.equal(values[0].float(), every)


@needs_products
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_as_accurate_as_bfloat16(shape: tuple[int, int, int], with_bias: bool) -> None:
    x, weight = rows_and_weight(*shape)

    def ours(bias: torch.Tensor) -> torch.Tensor:
        return ops.linear_fp8(x, weight, bias if with_bias else None)

    def plain(bias: torch.Tensor) -> torch.Tensor:
        wide = (dequantised(rows).to(bias.dtype) for rows in (x, weight))
        return F.linear(*wide, bias if with_bias else None)

    assert_as_accurate(ours, plain, seeded(shape[2]), dtype=torch.bfloat16)


@needs_products
def test_the_specification_says_the_same() -> None:
    x, weight = rows_and_weight(33, 64, 48)
    bias = seeded(48).bfloat16()
    expected = reference.linear_fp8(*x, *weight, bias.float())
    torch.testing.assert_close(
        ops.linear_fp8(x, weight, bias), expected.bfloat16(), rtol=2**-7, atol=2**-8
    )


@needs_products
def test_leading_axes_stay_and_an_empty_batch_is_empty() -> None:
    x, weight = ops.quantize_fp8(seeded(2, 3, 64)), ops.quantize_fp8(seeded(32, 64))
    y = ops.linear_fp8(x, weight)
    assert y.shape == (2, 3, 32)
    assert torch.equal(y[1], ops.linear_fp8(ops.FP8Rows(x.values[1], x.scales[1]), weight))
    empty = ops.FP8Rows(x.values[:0], x.scales[:0])
    assert ops.linear_fp8(empty, weight).shape == (0, 3, 32)


@pytest.mark.parametrize("shape", [(8, 960, 48), (8, 1920, 32)])
def test_fast_accumulation_of_a_gpu_errs_less_than_bfloat16(shape: tuple[int, int, int]) -> None:
    """mmaemu computes the sums as the tensor cores of an H100 do, which align and truncate."""
    mmaemu = pytest.importorskip("mmaemu", reason="mmaemu is not installed")
    x, weight = (ops.FP8Rows(*(t.cpu() for t in rows)) for rows in rows_and_weight(*shape))
    sums = mmaemu.accumulate(x.values, weight.values, use_fast_accum=True, splitk=1)
    emulated = sums.double() * x.scales * weight.scales.mT
    exact = dequantised(x) @ dequantised(weight).mT
    rounded = exact.bfloat16().double()
    assert (emulated - exact).norm() < (rounded - exact).norm()
    if ops.why_not_fp8(torch.device("cpu")) is None:
        ours = ops.linear_fp8(x, weight).double()
        assert (ours - emulated).norm() < 2 * (rounded - exact).norm()


def test_devices_without_fp8_say_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 0))
    assert "compute capability 8.9 or later" in str(ops.why_not_fp8(gpu))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 9))
    monkeypatch.setattr(torch.version, "hip", None)
    assert ops.why_not_fp8(gpu) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA" in str(ops.why_not_fp8(gpu))
    assert "not on meta" in str(ops.why_not_fp8(torch.device("meta")))
