"""All time-dependent parameters of a model at once (paper eq. 4–5)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dimr_fast import reference
from dimr_fast.ops.implementations import Implementations

Vectors = tuple[Tensor, Tensor, Tensor, Tensor]
"""param0, param1, nodecay_weight and nodecay_bias of one parameter, `[D]` each."""

implementations = Implementations("td_parameters", example=(4,))


def td_parameters(
    tau: Tensor, parameters: Sequence[Vectors], *, implementation: str = "auto"
) -> tuple[Tensor, ...]:
    """Value of each time-dependent parameter at the times `tau`.

    `tau` is `[T]`, one time per image or a single one for all; the result has a `[T, D]` tensor per
    parameter, whatever the widths `D`. A parameter at time τ is `p1 + s·(p0 − p1)` with
    `s = sigmoid((w + 1)·τ + b)`.
    Raises ValueError where `tau` is not one-dimensional or the implementation is unusable.
    """
    if tau.dim() != 1:
        raise ValueError(f"tau: got shape {tuple(tau.shape)}, expected [T]")
    implementations.select(implementation, tau)
    if not parameters:
        return ()
    widths = [p[0].shape[0] for p in parameters]
    joined = (torch.cat(vectors) for vectors in zip(*parameters, strict=True))
    return reference.td_parameter(tau, *joined).split(widths, -1)
