"""FP8 (e4m3) with one scale per row: rows, the matrix product, and where they run.

`td_rms_norm_fp8`, `td_layer_norm_fp8` and `gated_gelu_fp8` return such rows.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from dimr_fast import reference
from dimr_fast.ops import _triton
from dimr_fast.ops.implementations import Implementations
from dimr_fast.utils.compilation import constant_result

FP8_MULTIPLE = 16
"""Both sizes of a weight must be multiples of this: the products move 16 bytes at a time."""


class FP8Rows(NamedTuple):
    """A tensor `[…, D]` as e4m3 `values` `[…, D]` times fp32 `scales` `[…, 1]`."""

    values: Tensor
    scales: Tensor


def quantize_fp8(x: Tensor) -> FP8Rows:
    """Return `x` `[…, D]` as FP8 rows; the rows of a weight are its output channels."""
    return FP8Rows(*reference.quantize_fp8(x))


def linear_fp8(x: FP8Rows, weight: FP8Rows, bias: Tensor | None = None) -> Tensor:
    """Compute a linear layer of `x` `[…, K]` and `weight` `[N, K]`; return bfloat16 `[…, N]`.

    `bias` is `[N]` in bfloat16. K and N are multiples of `FP8_MULTIPLE`. No gradients are recorded.
    """
    rows = x.values.flatten(0, -2)
    shape = *x.values.shape[:-1], weight.values.shape[0]
    if not len(rows):
        return rows.new_empty(shape, dtype=torch.bfloat16)
    # Fast accumulation rounds the sums of the tensor cores. It adds less error than the rounding of
    # the result to bfloat16 does (tests/ops/test_fp8.py).
    product = torch._scaled_mm(
        rows,
        weight.values.mT,
        x.scales.view(-1, 1),
        weight.scales.mT,
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return product.view(shape)


def why_not_fp8(device: torch.device) -> str | None:
    """Return why FP8 products cannot run on `device`, or None if they can."""
    if device.type == "cuda":
        return _why_not_gpu(device.index)
    if device.type == "cpu":
        return _why_not_cpu()
    return f"it runs on a GPU or, slowly, on a CPU, not on {device.type}"


@constant_result
def _why_not_gpu(index: int | None) -> str | None:
    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU: AMD's have another FP8 format"
    if torch.cuda.get_device_capability(index) < (8, 9):
        return "it needs a GPU of compute capability 8.9 or later"
    return None


@functools.cache
def _why_not_cpu() -> str | None:
    one = quantize_fp8(torch.ones(FP8_MULTIPLE, FP8_MULTIPLE))
    try:
        linear_fp8(one, one)
    except (NotImplementedError, RuntimeError) as error:
        return f"torch {torch.__version__} has no FP8 products on a CPU ({error})"
    return None


def fp8_implementations(name: str, *, example: tuple[int, ...]) -> Implementations:
    """Return the implementations of an operator that quantises its result to FP8 rows."""
    return Implementations(
        name, example=example, triton=_why_not_triton, slower={"triton": _triton.slower}
    )


def _why_not_triton(x: Tensor) -> str | None:
    reason = _triton.why_not(x)
    return _why_not_gpu(x.device.index) if reason is None and x.is_cuda else reason


def fp8_shapes(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return empty values `[…, width]` and scales for the rows of `x`."""
    rows = x.shape[:-1]
    values = x.new_empty((*rows, width), dtype=torch.float8_e4m3fn)
    return values, x.new_empty((*rows, 1), dtype=torch.float32)


def fp8_norm_shapes(
    x: Tensor, residual: Tensor | None, *parameters: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return an empty sum, itself empty without residual, and the FP8 rows of a norm of `x`."""
    summed = x.new_empty(0)
    if residual is not None:
        summed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return summed, *fp8_shapes(x, x.shape[-1])
