"""Full softmax attention from a packed projection."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dimr_fast import reference
from dimr_fast.ops import attention_backends as backends
from dimr_fast.ops._checks import check_floating
from dimr_fast.ops._compiled import CPU
from dimr_fast.ops._triton import TRITON
from dimr_fast.ops.registration import Implementation, Operator, differentiable
from dimr_fast.utils.compilation import constant_result

_LARGEST_HEAD_DIM = 128


def _triton_why_not(qkv: Tensor) -> str | None:
    head_dim = backends.head_dim(qkv)
    if head_dim is not None and head_dim > _LARGEST_HEAD_DIM:
        return f"it takes a head_dim up to {_LARGEST_HEAD_DIM}, not {head_dim}"
    return TRITON.why_not(qkv)


@constant_result
def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


def _cpu_slower(qkv: Tensor) -> str | None:
    # With AMX, PyTorch's matrix products in bf16 are probably faster than this kernel for many
    # tokens; nobody has measured it. For few tokens their overhead dominates.
    if qkv.dtype == torch.bfloat16 and qkv.shape[1] > 128 and _has_amx():
        return "not measured on a processor with AMX for more than 128 tokens"
    return None


_MOST_TOKENS_MEASURED = 257


def _bmm_is_faster(qkv: Tensor) -> bool:
    # PyTorch's fused CPU kernel is made for long sequences. In bfloat16 plain matrix products are
    # faster on the sequences measured: several times at 65 tokens and, because of the backward
    # pass, at 257 (benchmarks/ops/bench_attention.py).
    few = qkv.shape[1] <= _MOST_TOKENS_MEASURED
    return qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and few


def _bmm_slower(qkv: Tensor) -> str | None:
    return None if _bmm_is_faster(qkv) else "it writes all scores to memory"


def _sdpa_slower(qkv: Tensor) -> str | None:
    if _bmm_is_faster(qkv):
        return f"slower on a CPU in bfloat16 up to {_MOST_TOKENS_MEASURED} tokens"
    return None


def _unmeasured(qkv: Tensor) -> str | None:
    return "its speed was not measured yet; select it by name to use it"


# Triton comes before sdpa on a GPU without a measurement yet. The reason is what Triton avoids:
# sdpa copies q, k and v to pad head_dim 60 to a multiple of 8, and copies their gradients together.
operator = Operator(
    "attention",
    replace(TRITON, why_not=_triton_why_not),
    replace(CPU, slower=_cpu_slower),
    Implementation("bmm", backends.bmm_why_not, _bmm_slower),
    Implementation("sdpa", backends.sdpa_why_not, _sdpa_slower),
    Implementation("flash_attn", backends.flash_attn_why_not, _unmeasured),
    Implementation("xformers", backends.xformers_why_not, _unmeasured),
    example=(4, 257, 2880),
)

_BACKENDS = {
    "bmm": backends.bmm,
    "sdpa": backends.sdpa,
    "flash_attn": backends.flash_attn,
    "xformers": backends.xformers,
}


def attention(qkv: Tensor, num_heads: int, *, implementation: str = "auto") -> Tensor:
    """Compute the attention of every token to every token, with scale `head_dim^-½`.

    `qkv` is `[B, N, 3·heads·head_dim]`, packed as `[3, heads, head_dim]`; the result is
    `[B, N, heads·head_dim]`. Implementations: "triton", "cpu" (the compiled
    library), "bmm" (PyTorch's batched matrix products), "sdpa" (PyTorch's
    scaled_dot_product_attention), "flash_attn" and "xformers" (these packages, if installed) and
    "reference".
    Raises ValueError if the width does not fit the heads or the implementation cannot run.
    """
    if qkv.dim() != 3 or num_heads < 1 or qkv.shape[-1] % (3 * num_heads) or not qkv.shape[-1]:
        raise ValueError(
            f"qkv: got shape {tuple(qkv.shape)}, expected [B, N, 3·{num_heads}·head_dim]"
        )
    check_floating(qkv=qkv)
    # Split by heads: whether an implementation can run depends on head_dim.
    packed = qkv.unflatten(-1, (3, num_heads, qkv.shape[-1] // (3 * num_heads)))
    chosen = operator.select(implementation, packed)
    if chosen == "triton":
        return _run(qkv, num_heads)
    if chosen == "cpu":
        return _run_cpu(qkv, num_heads)
    if chosen == "reference":
        return reference.attention(qkv, num_heads)
    return _BACKENDS[chosen](packed).flatten(2)


def _fwd_shapes(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    images, count, width = qkv.shape
    parts = qkv.new_empty((images, heads, 2, count), dtype=torch.float32)
    return qkv.new_empty((images, count, width // 3)), parts


def _bwd_shapes(dout: Tensor, qkv: Tensor, out: Tensor, parts: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _products_flops(count: int, qkv: list[int]) -> int:
    """Count the FLOP of `count` products of two matrices, such as q·kᵀ, in every head."""
    images, tokens, width = qkv
    return 2 * count * images * tokens**2 * width // 3


def _fwd_flops(qkv: list[int], heads: int, *, out_shape: Any) -> int:
    return _products_flops(2, qkv)


def _bwd_flops(dout: list[int], qkv: list[int], *saved: Any, out_shape: Any) -> int:
    return _products_flops(5, qkv)  # four gradients, and the scores again


_FWD = "(Tensor qkv, int heads) -> (Tensor, Tensor)"
_BWD = "(Tensor dout, Tensor qkv, Tensor out, Tensor parts, int heads) -> Tensor"
_fwd = operator.define("fwd", _FWD, _fwd_shapes, flops=_fwd_flops)
_bwd = operator.define("bwd", _BWD, _bwd_shapes, "triton", flops=_bwd_flops)["triton"]


def _forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
    out, parts = _fwd["triton"](qkv, heads)
    ctx.save_for_backward(qkv, out, parts)
    ctx.heads = heads
    return out


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
    return _bwd(dout, *ctx.saved_tensors, ctx.heads), None


_run = differentiable(_forward, _backward)


def _forward_cpu(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
    ctx.save_for_backward(qkv)
    ctx.heads = heads
    return _fwd["cpu"](qkv, heads)[0]


def _backward_cpu(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
    (qkv,) = ctx.saved_tensors
    packed = qkv.unflatten(-1, (3, ctx.heads, -1))
    dpacked = backends.bmm_gradient(dout.unflatten(-1, (ctx.heads, -1)), packed)
    return dpacked.flatten(2), None


_run_cpu = differentiable(_forward_cpu, _backward_cpu)
