"""All time-dependent parameters of a model at once (paper eq. 4–5)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dimr_fast import reference
from dimr_fast.ops import _compiled, _triton
from dimr_fast.ops._checks import check_floating
from dimr_fast.ops.implementations import Implementations

Vectors = tuple[Tensor, Tensor, Tensor, Tensor]
"""param0, param1, nodecay_weight and nodecay_bias of one parameter, `[D]` each."""

implementations = Implementations(
    "td_parameters",
    example=(4,),
    triton=_triton.why_not,
    cpu=_compiled.why_not_cpu,
    slower={"triton": _triton.slower},
)


def td_parameters(
    tau: Tensor, parameters: Sequence[Vectors], *, implementation: str = "auto"
) -> tuple[Tensor, ...]:
    """Value of each time-dependent parameter at the times `tau`.

    `tau` is `[T]`, one time per image or a single one for all; the result has a `[T, D]` tensor per
    parameter, whatever the widths `D`. A parameter at time τ is `p1 + s·(p0 − p1)` with
    `s = sigmoid((w + 1)·τ + b)`. Only the reference has a gradient with respect to `tau`.
    Raises ValueError where `tau` is not one-dimensional, the vectors are not all of one dtype on
    the device of `tau`, or those of one parameter not of one width, or the implementation is
    unusable.
    """
    if tau.dim() != 1:
        raise ValueError(f"tau: got shape {tuple(tau.shape)}, expected [T]")
    check_floating(tau=tau)
    chosen = implementations.select(implementation, tau)
    if not parameters:
        return ()
    _check(tau, parameters)
    reason = None if chosen == "reference" else _why_not(tau, parameters[0][0])
    if reason is not None:
        if implementation == chosen:
            raise ValueError(
                f"implementation: {chosen!r} of td_parameters cannot run here: {reason}"
            )
        chosen = "reference"
    widths = [p[0].shape[0] for p in parameters]
    kinds = zip(*parameters, strict=True)
    if chosen == "reference":
        values = reference.td_parameter(tau, *(torch.cat(kind) for kind in kinds))
    else:
        values = _TDParameters.apply(chosen, tau, *(v for kind in kinds for v in kind))
    return values.split(widths, -1)


def _check(tau: Tensor, parameters: Sequence[Vectors]) -> None:
    dtype = parameters[0][0].dtype
    for i, parameter in enumerate(parameters):
        width = parameter[0].shape
        for vector in parameter:
            if vector.shape != width or len(width) != 1:
                shapes = [tuple(v.shape) for v in parameter]
                raise ValueError(f"parameters[{i}]: got shapes {shapes}, expected four of [D]")
            if vector.dtype != dtype:
                raise ValueError(
                    f"parameters[{i}]: got dtype {vector.dtype}, expected that of the first, "
                    f"{dtype}"
                )
            if vector.device != tau.device:
                raise ValueError(
                    f"parameters[{i}]: got device {vector.device}, expected that of tau, "
                    f"{tau.device}"
                )


def _why_not(tau: Tensor, vector: Tensor) -> str | None:
    """What forbids it beside `tau` itself: kernels that see only `tau` cannot know."""
    if tau.requires_grad and torch.is_grad_enabled():
        return "it has no gradient with respect to tau"
    if vector.dtype not in _triton.DTYPES:
        return f"parameters are {str(vector.dtype).removeprefix('torch.')}"
    return None


def _fwd_shapes(
    tau: Tensor,
    param0: list[Tensor],
    param1: list[Tensor],
    weight: list[Tensor],
    bias: list[Tensor],
) -> Tensor:
    columns = sum(v.shape[0] for v in param0)
    dtype = torch.promote_types(tau.dtype, param0[0].dtype)
    return tau.new_empty((tau.shape[0], columns), dtype=dtype)


def _bwd_shapes(
    dvalues: Tensor,
    tau: Tensor,
    param0: list[Tensor],
    param1: list[Tensor],
    weight: list[Tensor],
    bias: list[Tensor],
) -> Tensor:
    return dvalues.new_empty((4, dvalues.shape[-1]), dtype=param0[0].dtype)


_VECTORS = "Tensor[] param0, Tensor[] param1, Tensor[] nodecay_weight, Tensor[] nodecay_bias"
_FWD = "td_parameters", "fwd", f"(Tensor tau, {_VECTORS}) -> Tensor", _fwd_shapes
_BWD = (
    "td_parameters",
    "bwd",
    f"(Tensor dvalues, Tensor tau, {_VECTORS}) -> Tensor",
    _bwd_shapes,
)
_fwd = {"triton": _triton.register(*_FWD), "cpu": _compiled.declare(*_FWD)}
_bwd = {"triton": _triton.register(*_BWD), "cpu": _compiled.declare(*_BWD)}


def _by_kind(vectors: Sequence[Tensor]) -> list[list[Tensor]]:
    count = len(vectors) // 4
    return [list(vectors[i * count : (i + 1) * count]) for i in range(4)]


class _TDParameters(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, implementation: str, tau: Tensor, *vectors: Tensor) -> Tensor:
        ctx.save_for_backward(tau, *vectors)
        ctx.implementation = implementation
        return _fwd[implementation](tau, *_by_kind(vectors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor | None, ...]:
        tau, *vectors = ctx.saved_tensors
        kinds = _by_kind(vectors)
        grads = _bwd[ctx.implementation](dvalues, tau, *kinds)
        widths = [v.shape[0] for v in kinds[0]]
        return None, None, *(grad for kind in grads for grad in kind.split(widths))
