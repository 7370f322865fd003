"""All blocks of a branch as one operator of the CPU library, for inference."""

from collections.abc import Sequence

from torch import Tensor

from dimr_fast.ops.registration import compiled_operator

_SCHEMA = (
    "(Tensor x, Tensor(a!) pairs, Tensor[] values, Tensor[] parameters, int heads, int height, "
    "bool layer_norm, bool packed) -> Tensor"
)


def branch_blocks(
    x: Tensor,
    pairs: Tensor,
    values: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    heads: int,
    height: int,
    layer_norm: bool,
    packed: bool,
) -> Tensor:
    """Run the blocks of a branch on `x` `[B, N, D]`; return the output of the last one.

    There are 2·depth + 1 blocks. The others write to `pairs` `[depth, B, N, 2, D]`: blocks j <
    depth to `pairs[depth − 1 − j, …, 1, :]`, blocks depth ≤ j < 2·depth to `pairs[j − depth, …, 0,
    :]`. The input of each skip connection's linear layer is therefore one tensor `[B, N, 2·D]`.

    `values`: the scale `[T, D]` of each norm, in the order of use. If `layer_norm` is True, each
    scale is followed by the norm's shift `[T, D]`. `parameters`: the other tensors in the order of
    use. For each block: weight and bias of the skip connection (blocks j > depth only); the weights
    of q, k and v, and weight and bias of the output projection (transformer), or weight and bias of
    the convolution; weights and biases of the merged input projections of the MLP and of its output
    projection. `heads` is 0 for a ConvNeXt branch, whose image has `height` rows. `packed` weights
    are in oneDNN's layout.

    No gradients are recorded. Only those properties of the arguments are checked that could cause
    an out-of-bounds memory access.
    """
    return _run(x, pairs, list(values), list(parameters), heads, height, layer_norm, packed)


_run = compiled_operator("branch_blocks", _SCHEMA)
