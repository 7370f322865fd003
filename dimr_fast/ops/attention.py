"""Full softmax attention from a packed projection."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dimr_fast import reference
from dimr_fast.ops.implementations import Implementations


def _sdpa_why_not(qkv: Tensor) -> str | None:
    return None


_MEASURED = 257


def _sdpa_slower(qkv: Tensor) -> str | None:
    # PyTorch's CPU kernel is made for long sequences. In bfloat16 plain matrix products beat it on
    # those measured: several times at 65 tokens, at 257 by their backward pass
    # (benchmarks/bench_attention.py).
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and qkv.shape[1] <= _MEASURED:
        return f"slower on a CPU in bfloat16 up to {_MEASURED} tokens"
    return None


implementations = Implementations(
    "attention", example=(4, 257, 2880), sdpa=_sdpa_why_not, slower={"sdpa": _sdpa_slower}
)


def attention(qkv: Tensor, num_heads: int, *, implementation: str = "auto") -> Tensor:
    """Attention of every token to every token, with scale `head_dim^-½`.

    `qkv` is `[B, N, 3·heads·head_dim]`, packed as `[3, heads, head_dim]`; the result
    `[B, N, heads·head_dim]`. Implementations: "sdpa" (PyTorch's scaled_dot_product_attention) and
    "reference".
    Raises ValueError where the width does not fit the heads or the implementation is unusable.
    """
    if qkv.dim() != 3 or num_heads < 1 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"qkv: got shape {tuple(qkv.shape)}, expected [B, N, 3·{num_heads}·head_dim]"
        )
    if implementations.select(implementation, qkv) == "reference":
        return reference.attention(qkv, num_heads)
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
