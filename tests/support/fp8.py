"""What every quantising operator promises, and the GPUs that its kernel is compiled for."""

import torch

from dimr_fast.ops import FP8Rows

FP8_TARGETS = ("sm_89", "sm_90", "sm_100")


def dequantised(rows: FP8Rows) -> torch.Tensor:
    """Return FP8 rows in float64."""
    return rows.values.double() * rows.scales.double()


def assert_nearest(rows: FP8Rows, truth: torch.Tensor, error: torch.Tensor) -> None:
    """Assert that the rows are those of `truth` (float64), rounded to the nearest e4m3 values.

    The largest magnitude of a row is 448 times its scale. e4m3 has three bits after the leading
    one, down to 2⁻⁶. `error` is the error that the operator may have before it quantises. On sm_89
    Triton truncates to fp16 first, an error of up to 2⁻¹⁰.
    """
    assert rows.values.dtype == torch.float8_e4m3fn
    assert rows.scales.dtype == torch.float32
    assert rows.values.shape == truth.shape
    assert rows.scales.shape == (*truth.shape[:-1], 1)
    if truth.numel() == 0:
        return
    scale = rows.scales.double()
    expected = truth.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    assert ((scale - expected).abs() <= error.amax(-1, keepdim=True) / 448 + 1e-6 * expected).all()
    step = 2 ** (torch.frexp(truth / scale).exponent - 1).clamp(min=-6).double() / 8
    allowed = scale * step / 2 + error + 2**-10 * truth.abs()
    assert ((dequantised(rows) - truth).abs() <= allowed).all()
