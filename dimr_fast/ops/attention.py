"""Full softmax attention from a packed projection."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dimr_fast import reference
from dimr_fast.ops import _triton
from dimr_fast.ops import attention_backends as backends
from dimr_fast.ops._checks import check_floating
from dimr_fast.ops.implementations import Implementations

_WIDEST_HEAD = 128


def _triton_why_not(qkv: Tensor) -> str | None:
    head_dim = backends.head_dim(qkv)
    if head_dim is not None and head_dim > _WIDEST_HEAD:
        return f"it takes a head_dim up to {_WIDEST_HEAD}, not {head_dim}"
    return _triton.why_not(qkv)


_MEASURED = 257


def _few_tokens(qkv: Tensor) -> bool:
    # PyTorch's CPU kernel is made for long sequences. In bfloat16 plain matrix products beat it on
    # those measured: several times at 65 tokens, at 257 by their backward pass
    # (benchmarks/bench_attention.py).
    return qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and qkv.shape[1] <= _MEASURED


def _bmm_slower(qkv: Tensor) -> str | None:
    return None if _few_tokens(qkv) else "it writes all scores to memory"


def _sdpa_slower(qkv: Tensor) -> str | None:
    return f"slower on a CPU in bfloat16 up to {_MEASURED} tokens" if _few_tokens(qkv) else None


def _unmeasured(qkv: Tensor) -> str | None:
    return "never measured: it runs where it is named"


# That triton comes before sdpa on a GPU rests on no measurement yet, but on what it leaves out:
# sdpa pads head_dim 60 in memory to a multiple of 8, and gathers the gradient of the packed qkv.
implementations = Implementations(
    "attention",
    example=(4, 257, 2880),
    triton=_triton_why_not,
    bmm=backends.bmm_why_not,
    sdpa=backends.sdpa_why_not,
    flash_attn=backends.flash_attn_why_not,
    xformers=backends.xformers_why_not,
    slower={
        "triton": _triton.slower,
        "bmm": _bmm_slower,
        "sdpa": _sdpa_slower,
        "flash_attn": _unmeasured,
        "xformers": _unmeasured,
    },
)

_BACKENDS = {
    "bmm": backends.bmm,
    "sdpa": backends.sdpa,
    "flash_attn": backends.flash_attn,
    "xformers": backends.xformers,
}


def attention(qkv: Tensor, num_heads: int, *, implementation: str = "auto") -> Tensor:
    """Attention of every token to every token, with scale `head_dim^-½`.

    `qkv` is `[B, N, 3·heads·head_dim]`, packed as `[3, heads, head_dim]`; the result
    `[B, N, heads·head_dim]`. Implementations: "triton", "bmm" (PyTorch's batched products), "sdpa"
    (its scaled_dot_product_attention), "flash_attn" and "xformers" (the packages, where installed)
    and "reference".
    Raises ValueError where the width does not fit the heads or the implementation is unusable.
    """
    if qkv.dim() != 3 or num_heads < 1 or qkv.shape[-1] % (3 * num_heads) or not qkv.shape[-1]:
        raise ValueError(
            f"qkv: got shape {tuple(qkv.shape)}, expected [B, N, 3·{num_heads}·head_dim]"
        )
    check_floating(qkv=qkv)
    # By heads, so that an implementation can tell whether head_dim suits it.
    packed = qkv.unflatten(-1, (3, num_heads, qkv.shape[-1] // (3 * num_heads)))
    chosen = implementations.select(implementation, packed)
    if chosen == "triton":
        return _Attention.apply(qkv, num_heads)
    if chosen == "reference":
        return reference.attention(qkv, num_heads)
    return _BACKENDS[chosen](packed).flatten(2)


def _fwd_shapes(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    images, count, width = qkv.shape
    parts = qkv.new_empty((images, heads, 2, count), dtype=torch.float32)
    return qkv.new_empty((images, count, width // 3)), parts


def _bwd_shapes(dout: Tensor, qkv: Tensor, out: Tensor, parts: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


_fwd = _triton.register(
    "attention", "fwd", "(Tensor qkv, int heads) -> (Tensor, Tensor)", _fwd_shapes
)
_bwd = _triton.register(
    "attention",
    "bwd",
    "(Tensor dout, Tensor qkv, Tensor out, Tensor parts, int heads) -> Tensor",
    _bwd_shapes,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        out, parts = _fwd(qkv, heads)
        ctx.save_for_backward(qkv, out, parts)
        ctx.heads = heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return _bwd(dout, *ctx.saved_tensors, ctx.heads), None
