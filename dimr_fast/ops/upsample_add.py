"""The cascade between two branches (paper section 3.1)."""

from collections.abc import Sequence

from torch import Tensor

from dimr_fast import reference
from dimr_fast.ops._checks import check_times
from dimr_fast.ops.implementations import Implementations

implementations = Implementations("upsample_add")


def upsample_add(
    x: Tensor,
    features: Sequence[Tensor],
    norm_in: tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor,
    norm_out: tuple[Tensor, Tensor],
    *,
    implementation: str = "auto",
) -> Tensor:
    """Add the features of a branch to the embedding `x` of the next, q times larger, branch.

    `x` is `[B, H, W, D]`; `features` are `S` tensors `[B, H/q, W/q, d]`; `weight` is
    `[D·q², S·d]` and `bias` `[D·q²]`. `norm_in` and `norm_out` are the scale and shift of the TD
    layer norms before the projection (`[T, S·d]`) and after the pixel shuffle (`[T, D]`). The
    projection's output channels are ordered `[row, column, D]` within a q×q box.
    Raises ValueError where shapes do not fit or the implementation is unusable.
    """
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, H, W, D]")
    _check_features(x, features)
    width = sum(f.shape[-1] for f in features)
    q = x.shape[1] // features[0].shape[1]
    expected = (x.shape[-1] * q * q, width)
    if tuple(weight.shape) != expected:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected {expected}")
    if tuple(bias.shape) != expected[:1]:
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected {expected[:1]}")
    for name, pair, axis in (("norm_in", norm_in, width), ("norm_out", norm_out, x.shape[-1])):
        for value in pair:
            check_times(x, value, name, axis)
    implementations.select(implementation, x)
    return reference.upsample_add(x, features, norm_in, weight, bias, norm_out)


def _check_features(x: Tensor, features: Sequence[Tensor]) -> None:
    if not features:
        raise ValueError("features: got none, expected at least one [B, h, w, d]")
    for i, f in enumerate(features):
        if f.dim() != 4 or f.shape[0] != x.shape[0] or f.shape[1:3] != features[0].shape[1:3]:
            raise ValueError(
                f"features[{i}]: got shape {tuple(f.shape)}, expected [B, h, w, d] as the others"
            )
    h, w = features[0].shape[1:3]
    q = x.shape[1] // max(h, 1)
    if (h * q, w * q) != tuple(x.shape[1:3]):
        raise ValueError(
            f"features: got size {(h, w)}, expected a divisor of {tuple(x.shape[1:3])}"
        )
