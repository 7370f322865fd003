"""Depthwise convolution on channels-last features, stride 1, zero padding, same size:

y[b, h, w, d] = bias[d] + Σ_ij weight[d, 0, i, j] · x[b, h + i − k//2, w + j − k//2, d]
"""

from typing import Any

import torch

from dimr_fast import _extension, reference
from dimr_fast.ops._checks import compute_dtype
from dimr_fast.ops.implementations import Implementations

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _why_not_compiled(x: torch.Tensor, device: str) -> str | None:
    if x.device.type != device:
        return f"it runs on {device}, x is on {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"it takes {', '.join(map(_name, _DTYPES))}, x is {_name(x.dtype)}"
    return _extension.why_not(device)


def _why_not_cpu(x: torch.Tensor) -> str | None:
    return _why_not_compiled(x, "cpu")


def _why_not_cuda(x: torch.Tensor) -> str | None:
    return _why_not_compiled(x, "cuda") or _extension.why_not_gpu(x.device.index)


def _slower_on_cpu(x: torch.Tensor) -> str | None:
    # oneDNN wins in float32 and bfloat16; torch has no fast float16 convolution on a CPU
    # (benchmarks/bench_depthwise_conv2d.py).
    return None if x.dtype == torch.float16 else "torch is faster except in float16"


def _slower_on_cuda(x: torch.Tensor) -> str | None:
    return "not yet measured against torch on a GPU"


implementations = Implementations(
    "depthwise_conv2d",
    example=(4, 32, 32, 480),
    cpu=_why_not_cpu,
    cuda=_why_not_cuda,
    slower={"cpu": _slower_on_cpu, "cuda": _slower_on_cuda},
)


def depthwise_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    implementation: str = "auto",
) -> torch.Tensor:
    """Convolve each channel with its own odd k×k kernel, zero padding, same size.

    Args:
        x: [B, H, W, D], any strides; float32, bfloat16, float16 (float64: reference only).
        weight: [D, 1, k, k], k odd, dtype and device of x.
        bias: [D] or None, likewise.
        implementation: "auto", "cpu", "cuda" or "reference".

    Returns [B, H, W, D], in the dtype of x or, under autocast, in autocast's. Sums are fp32.
    Raises TypeError and ValueError naming the argument; ValueError also where a named
    implementation cannot run. Source: the ConvNeXt blocks of arXiv 2406.09416.
    """
    _check(x, weight, bias)
    dtype = compute_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    chosen = implementations.select(implementation, x)
    if chosen == "reference":
        return reference.depthwise_conv2d(x, weight, bias)
    return _DepthwiseConv2d.apply(x, weight, bias)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        if not (isinstance(value, torch.Tensor) or (name == "bias" and value is None)):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, H, W, D] with H, W, D > 0")
    if not x.is_floating_point():
        raise TypeError(f"x: got dtype {_name(x.dtype)}, expected floating point")
    d, k = x.shape[-1], weight.shape[-1] if weight.dim() else 0
    if tuple(weight.shape) != (d, 1, k, k) or k % 2 == 0:
        shape = tuple(weight.shape)
        raise ValueError(f"weight: got shape {shape}, expected [{d}, 1, k, k] with odd k")
    if bias is not None and tuple(bias.shape) != (d,):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected [{d}]")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if value.device != x.device:
            raise ValueError(f"{name}: got device {value.device}, expected that of x, {x.device}")
        if compute_dtype(value) != compute_dtype(x):
            raise TypeError(
                f"{name}: got dtype {_name(value.dtype)}, expected that of x, {_name(x.dtype)}"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


torch.library.define(
    "dimr_fast::depthwise_conv2d_fwd",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("dimr_fast::depthwise_conv2d_fwd")
def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return torch.ops.dimr_fast.depthwise_conv2d_fwd(
            x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
        )

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d, pad = weight.shape[0], weight.shape[-1] // 2
        wanted = list(ctx.needs_input_grad[:3])
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grads[0].permute(0, 3, 1, 2),
            x.permute(0, 3, 1, 2),
            weight,
            [d] if ctx.has_bias else None,
            stride=[1, 1],
            padding=[pad, pad],
            dilation=[1, 1],
            transposed=False,
            output_padding=[0, 0],
            groups=d,
            output_mask=wanted,
        )
        return grad_x.permute(0, 2, 3, 1) if wanted[0] else None, grad_weight, grad_bias
