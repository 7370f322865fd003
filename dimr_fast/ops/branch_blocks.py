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

    The others write to `pairs` `[depth, B, N, 2, D]`: in-block j to `pairs[depth − 1 − j, …, 1, :]`
    and out-block j to `pairs[j − depth, …, 0, :]`, so that the input of each skip connection's
    linear layer is one tensor `[B, N, 2·D]`.

    `values` are the norms' scales `[T, D]`, with `layer_norm` scale and shift, in the order of use.
    `parameters` are the other tensors in the order of use. For each block: weight and bias of the
    skip connection (out-blocks only); the weights of q, k and v, and weight and bias of the output
    projection (transformer), or weight and bias of the convolution; weights and biases of the
    merged input projections of the MLP and of its output projection. `heads` is 0 for a ConvNeXt
    branch, whose image has `height` rows. `packed` weights are in oneDNN's layout.

    Without gradients. The arguments are not checked beyond what keeps memory accesses in bounds;
    `dimr_fast.inference` makes them.
    """
    return _run(x, pairs, list(values), list(parameters), heads, height, layer_norm, packed)


_run = compiled_operator("branch_blocks", _SCHEMA)
