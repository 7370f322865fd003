"""The cascade between two branches (paper section 3.1)."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dimr_fast import reference
from dimr_fast.ops._checks import (
    KERNEL_DTYPES,
    check_device,
    check_floating,
    check_times,
    compute_dtype,
)
from dimr_fast.ops._compiled import CPU
from dimr_fast.ops._triton import TRITON
from dimr_fast.ops.registration import Operator, differentiable
from dimr_fast.ops.td_layer_norm import bwd as norm_in_bwd
from dimr_fast.ops.td_layer_norm import fwd as norm_in_fwd
from dimr_fast.ops.td_layer_norm import parameter_gradients

operator = Operator("upsample_add", TRITON, CPU, example=(4, 32, 32, 480))

Values = tuple[Tensor, Tensor]
"""The scale and the shift of a TD layer norm, each `[T, D]`."""


def upsample_add(
    x: Tensor,
    features: Sequence[Tensor] | Tensor,
    norm_in: Values,
    weight: Tensor,
    bias: Tensor,
    norm_out: Values,
    *,
    implementation: str = "auto",
) -> Tensor:
    """Add the upsampled features of a branch to the embedding `x` of the next branch.

    The next branch is q times larger. `x` is `[B, H, W, D]`; `features` are `S` tensors
    `[B, H/q, W/q, d]` or one buffer `[B, H/q, W/q, S, d]`; `weight` is `[D·q², S·d]` and `bias`
    `[D·q²]`. `norm_in` and `norm_out` are the scale and shift of the TD layer norms before the
    projection (`[T, S·d]`) and after the pixel shuffle (`[T, D]`). The output channels of the
    projection are ordered `[row, column, D]` within a q×q box. The projection computes in the dtype
    of the features or, under autocast, in autocast's.
    Raises ValueError if shapes, dtypes or devices do not fit or the implementation cannot run.
    """
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, H, W, D]")
    if isinstance(features, Tensor) and features.dim() != 5:
        raise ValueError(f"features: got shape {tuple(features.shape)}, expected [B, h, w, S, d]")
    check_floating(x=x, weight=weight, bias=bias)
    slots = list(features.unbind(-2) if isinstance(features, Tensor) else features)
    _check_features(x, slots)
    dtype = reduce(torch.promote_types, (f.dtype for f in slots))
    slots = [f.to(dtype) for f in slots]
    _check_parameters(x, slots, norm_in, weight, bias, norm_out)
    chosen = operator.select(implementation, x)
    if chosen != "reference" and dtype not in KERNEL_DTYPES:
        if implementation != "auto":
            raise ValueError(f"features: got dtype {dtype}, expected one of {KERNEL_DTYPES}")
        chosen = "reference"
    if chosen == "reference":
        return reference.upsample_add(x, slots, norm_in, weight, bias, norm_out)
    pieces = slots  # of the rows to norm
    if isinstance(features, Tensor) and features.stride(-2) == features.shape[-1]:
        pieces = [features.flatten(-2)]
    return _run(x, *norm_in, weight, bias, *norm_out, compute_dtype(pieces[0]), chosen, *pieces)


def _check_features(x: Tensor, features: Sequence[Tensor]) -> None:
    if not features:
        raise ValueError("features: got none, expected at least one [B, h, w, d]")
    for i, f in enumerate(features):
        if f.dim() != 4 or f.shape[0] != x.shape[0] or f.shape != features[0].shape:
            raise ValueError(
                f"features[{i}]: got shape {tuple(f.shape)}, expected [B, h, w, d] as the others"
            )
        check_device(x, f, f"features[{i}]")
        check_floating(**{f"features[{i}]": f})
    h, w = features[0].shape[1:3]
    q = x.shape[1] // max(h, 1)
    if (h * q, w * q) != tuple(x.shape[1:3]):
        raise ValueError(
            f"features: got size {(h, w)}, expected a divisor of {tuple(x.shape[1:3])}"
        )


def _check_parameters(
    x: Tensor,
    features: Sequence[Tensor],
    norm_in: Values,
    weight: Tensor,
    bias: Tensor,
    norm_out: Values,
) -> None:
    width = len(features) * features[0].shape[-1]
    q = x.shape[1] // max(features[0].shape[1], 1)
    expected = (x.shape[-1] * q * q, width)
    if tuple(weight.shape) != expected:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected {expected}")
    if tuple(bias.shape) != expected[:1]:
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected {expected[:1]}")
    for name, value in (("weight", weight), ("bias", bias)):
        check_device(x, value, name)
        # Under autocast both are cast to autocast's dtype.
        if compute_dtype(value) != compute_dtype(features[0]):
            raise ValueError(
                f"{name}: got dtype {value.dtype}, expected that of features, {features[0].dtype}"
            )
    for name, pair, axis in (("norm_in", norm_in, width), ("norm_out", norm_out, x.shape[-1])):
        for value in pair:
            check_times(x, value, name, axis)
            check_device(x, value, name)


def _fwd_shapes(
    x: Tensor, projected: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, projected.dtype)
    rows = (x.shape[0], x.shape[1] * x.shape[2])
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return out, mean, rstd


def _bwd_shapes(
    dout: Tensor, projected: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, times: int
) -> tuple[Tensor, Tensor, Tensor]:
    parameters = dout.new_empty((2, times, dout.shape[-1]), dtype=torch.float32)
    return (
        projected.new_empty(projected.shape),
        parameters,
        parameters.new_empty(projected.shape[-1]),
    )


_FWD = "(Tensor x, Tensor projected, Tensor weight, Tensor bias) -> (Tensor, Tensor, Tensor)"
_BWD = (
    "(Tensor dout, Tensor projected, Tensor weight, Tensor mean, Tensor rstd, int times)"
    " -> (Tensor, Tensor, Tensor)"
)
_fwd = operator.define("fwd", _FWD, _fwd_shapes)
_bwd = operator.define("bwd", _BWD, _bwd_shapes)


def _forward(
    ctx: Any,
    x: Tensor,
    scale_in: Tensor,
    shift_in: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale_out: Tensor,
    shift_out: Tensor,
    dtype: torch.dtype,
    implementation: str,
    *pieces: Tensor,
) -> Tensor:
    norm_in = norm_in_fwd[implementation]
    _, normed, *statistics_in = norm_in(scale_in, shift_in, pieces, None, dtype)
    projected = F.linear(normed, weight.to(dtype), bias.to(dtype))
    out, *statistics_out = _fwd[implementation](x, projected, scale_out, shift_out)
    # The normed features are as large as all features together: backward computes them again.
    ctx.save_for_backward(
        scale_in,
        shift_in,
        *statistics_in,
        weight,
        projected,
        scale_out,
        shift_out,
        *statistics_out,
        *pieces,
    )
    ctx.dtypes = x.dtype, bias.dtype
    ctx.implementation = implementation
    return out


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    scale_in, shift_in, mean_in, rstd_in, weight, projected, *rest = ctx.saved_tensors
    scale_out, shift_out, mean_out, rstd_out, *pieces = rest
    x_dtype, bias_dtype = ctx.dtypes
    times = max(scale_out.shape[0], shift_out.shape[0])
    dprojected, dnorm_out, dbias = _bwd[ctx.implementation](
        dout, projected, scale_out, mean_out, rstd_out, times
    )
    dnormed = dprojected @ weight.to(dprojected.dtype)
    needs_pieces = any(ctx.needs_input_grad[9:])
    dpieces, dnorm_in, normed = norm_in_bwd[ctx.implementation](
        dnormed, None, pieces, scale_in, shift_in, mean_in, rstd_in, needs_pieces, True
    )
    dweight = dprojected.flatten(0, -2).mT @ normed.flatten(0, -2)
    return (
        dout.to(x_dtype),
        *parameter_gradients(dnorm_in, scale_in, shift_in),
        dweight.to(weight.dtype),
        dbias.to(bias_dtype),
        *parameter_gradients(dnorm_out, scale_out, shift_out),
        None,
        None,
        *(dpieces if needs_pieces else [None] * len(pieces)),
    )


_run = differentiable(_forward, _backward)
