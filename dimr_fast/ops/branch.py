"""A branch of the model as one operator of the CPU library, for inference."""

from collections.abc import Sequence
from enum import IntEnum

from torch import Tensor

from dimr_fast.ops.registration import compiled_operator

_BRANCH = (
    "(Tensor image, Tensor(a!) first, Tensor(b!) pairs, Tensor(c!) last, Tensor[] lower, "
    "Tensor? token, Tensor[] values, Tensor[] parameters, int heads, bool layer_norm, "
    "bool predicts) -> Tensor"
)
_PACK = "(Tensor weight, Tensor? bias, int factors, bool gated) -> Tensor"


class Factors(IntEnum):
    """What the matrix products of `branch` multiply."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2


def pack_linear(
    weight: Tensor, bias: Tensor | None, factors: Factors, *, gated: bool = False
) -> Tensor:
    """Return the weights of a linear layer for `branch`, as one tensor of bytes.

    `weight` is `[N, K]` and `bias` `[N]`, both float32 on the CPU. INT8 scales each row of `weight`
    so that its largest magnitude is 127, and `branch` does so with each row of the layer's input;
    products and sums of integers are exact. With `gated`, the layer computes gelu(a) · b of the
    halves a and b of its N outputs.
    """
    return _pack(weight.contiguous(), bias, int(factors), gated)


def branch(
    image: Tensor,
    first: Tensor,
    pairs: Tensor,
    last: Tensor,
    lower: Sequence[Tensor],
    token: Tensor | None,
    values: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    heads: int,
    layer_norm: bool,
    predicts: bool,
) -> Tensor:
    """Run a branch on `image` `[B, C, H, W]`; return its prediction `[B, C, h, w]` in float32.

    The result is empty if `predicts` is False. There are 2·depth + 1 blocks. The input of the first
    block is written to `first` `[B, N, D]` and the output of the last one to `last` `[B, N, D]`.
    The other outputs are written to `pairs` `[depth, B, N, 2, D]`: blocks j < depth to
    `pairs[depth − 1 − j, …, 1, :]`, blocks depth ≤ j < 2·depth to `pairs[j − depth, …, 0, :]`. The
    input of each skip connection's linear layer is therefore one tensor `[B, N, 2·D]`. `lower` is
    `first`, `pairs` and `last` of the branch below, or empty. N is h·w, or h·w + 1 with a class
    `token` `[B, D]`.

    `values`: the scale and shift `[T, D]` of each norm, in the order of use: the two norms of the
    cascade, the norms of the blocks, the norm of the head. Without `layer_norm`, the norms of the
    blocks are RMS norms, which have no shift. `parameters`: the other tensors in the order of use;
    linear layers are results of `pack_linear`. The embedding of patches and the position embeddings
    `[h·w, D]`; the projection of the cascade; for each block: the skip connection (blocks j >
    depth), the projection to q, k and v and the output projection (transformer) or weight and bias
    of the convolution, the gated layer of the MLP and its output projection; then the weight of the
    head's convolution as `[C·k·k, D]` and its bias `[C]` in float32. `heads` is 0 for a ConvNeXt
    branch.

    No gradients are recorded. Only those properties of the arguments are checked that could cause
    an out-of-bounds memory access.
    """
    return _branch(
        image,
        first,
        pairs,
        last,
        list(lower),
        token,
        list(values),
        list(parameters),
        heads,
        layer_norm,
        predicts,
    )


_branch = compiled_operator("branch", _BRANCH)
_pack = compiled_operator("pack_linear", _PACK)
