"""Attention by PyTorch and other packages: when each can run, and how to call it.

Each function takes `packed` `[B, N, 3, heads, head_dim]`, returns `[B, N, heads, head_dim]` and
does any change of layout or padding that its package needs.
"""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dimr_fast.ops import _triton, packages
from dimr_fast.ops._checks import dtype_name
from dimr_fast.ops.registration import differentiable
from dimr_fast.utils.compilation import constant_result


def head_dim(qkv: Tensor) -> int | None:
    """Return the head_dim of `qkv` `[B, N, 3, heads, head_dim]`, None for `[B, N, D]`."""
    return qkv.shape[-1] if qkv.dim() == 5 else None


def bmm_why_not(qkv: Tensor) -> str | None:
    """Return None: batched matrix products run on every device and dtype."""
    return None


def bmm(packed: Tensor) -> Tensor:
    """Compute attention by `torch.bmm`, which writes all scores to memory.

    Backward computes them again: for 257 tokens they are larger than q, k and v together.
    """
    return _run_bmm(packed)


def _bmm_forward(ctx: Any, packed: Tensor) -> Tensor:
    images, _, _, heads, _ = packed.shape
    _, _, v, weights = _split_with_weights(packed)
    ctx.save_for_backward(packed)
    return weights.bmm(v).unflatten(0, (images, heads)).transpose(1, 2)


def _bmm_backward(ctx: Any, dout: Tensor) -> tuple[Tensor]:
    return (bmm_gradient(dout, *ctx.saved_tensors),)


def _split_with_weights(packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v `[B·heads, N, head_dim]` and the attention weights `[B·heads, N, N]`."""
    images, count, _, heads, width = packed.shape
    q, k, v = packed.permute(2, 0, 3, 1, 4).reshape(3, images * heads, count, width)
    # Scaled within the product: in half precision the scores are rounded once.
    scores = torch.baddbmm(q.new_empty((1, 1, 1)), q, k.mT, beta=0, alpha=width**-0.5)
    return q, k, v, scores.softmax(-1)


def bmm_gradient(dout: Tensor, packed: Tensor) -> Tensor:
    """Return the gradient of `packed`; the attention weights are computed again by `torch.bmm`."""
    q, k, v, weights = _split_with_weights(packed)
    images, count, heads, width = dout.shape
    dout = dout.transpose(1, 2).reshape(images * heads, count, width)
    dweights = dout.bmm(v.mT)
    dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
    scale, start = width**-0.5, q.new_empty((1, 1, 1))
    grads = (
        torch.baddbmm(start, dscores, k, beta=0, alpha=scale),
        torch.baddbmm(start, dscores.mT, q, beta=0, alpha=scale),
        weights.mT.bmm(dout),
    )
    dpacked = q.new_empty((images, count, 3, heads, width))
    for i, grad in enumerate(grads):
        dpacked[:, :, i] = grad.unflatten(0, (images, heads)).transpose(1, 2)
    return dpacked


_run_bmm = differentiable(_bmm_forward, _bmm_backward)


def sdpa_why_not(qkv: Tensor) -> str | None:
    """Return None: PyTorch's own attention runs on every device and dtype."""
    return None


def sdpa(packed: Tensor) -> Tensor:
    """Compute attention by `torch.nn.functional.scaled_dot_product_attention`."""
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def flash_attn_why_not(qkv: Tensor) -> str | None:
    """Return why flash-attn 2 cannot run on `qkv`, or None if it can."""
    width = head_dim(qkv)
    if qkv.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, qkv is {dtype_name(qkv.dtype)}"
    if width is not None and width > 256:
        return f"it takes a head_dim up to 256, not {width}"
    return _why_not_here(qkv, "flash_attn", "flash-attn")


def flash_attn(packed: Tensor) -> Tensor:
    """Compute attention by flash-attn 2, which takes the packed tensor without a copy.

    The package itself pads a head_dim that is not a multiple of 8. Written from the signature in
    flash-attn 2.8.3; it has not run on hardware.
    """
    return importlib.import_module("flash_attn").flash_attn_qkvpacked_func(
        packed,
        softmax_scale=packed.shape[-1] ** -0.5,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def xformers_why_not(qkv: Tensor) -> str | None:
    """Return why xformers cannot run on `qkv`, or None if it can."""
    if qkv.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, qkv is {dtype_name(qkv.dtype)}"
    return _why_not_here(qkv, "xformers.ops", "xformers")


def xformers(packed: Tensor) -> Tensor:
    """Compute attention by xformers, with each head padded to a multiple of 16 bytes.

    Written from the signature in xformers 0.0.35, whose kernels for GPUs since the A100 refuse
    other widths; it has not run on hardware.
    """
    ops = importlib.import_module("xformers.ops")
    width = packed.shape[-1]
    padding = -width % (16 // packed.element_size())
    q, k, v = (F.pad(packed, (0, padding)) if padding else packed).unbind(2)
    return ops.memory_efficient_attention(q, k, v, scale=width**-0.5)[..., :width]


_VERSIONS = {"flash-attn": ((2, 4, 1), (3,)), "xformers": ((0, 0, 35), (1,))}
"""Supported versions of each package: from the first (inclusive) to the second (exclusive)."""


def _why_not_here(qkv: Tensor, module: str, package: str) -> str | None:
    if not qkv.is_cuda:
        return f"it runs on a GPU, qkv is on {qkv.device.type}"
    return _why_not_installed(module, package) or _triton.why_not_gpu(qkv.device.index)


@constant_result
def _why_not_installed(module: str, package: str) -> str | None:
    return packages.why_not(package, module, *_VERSIONS[package])
