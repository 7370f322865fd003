"""The values of all time-dependent parameters of a model, in one operation (paper eq. 4–5)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dimr_fast import reference
from dimr_fast.ops._checks import KERNEL_DTYPES, check_floating, dtype_name
from dimr_fast.ops._compiled import CPU
from dimr_fast.ops._triton import TRITON
from dimr_fast.ops.registration import Operator, differentiable

Vectors = tuple[Tensor, Tensor, Tensor, Tensor]
"""param0, param1, nodecay_weight and nodecay_bias of one parameter, `[D]` each."""

operator = Operator("td_parameters", TRITON, CPU, example=(4,))


def td_parameters(
    tau: Tensor, parameters: Sequence[Vectors], *, implementation: str = "auto"
) -> tuple[Tensor, ...]:
    """Return the value `[T, D]` of each time-dependent parameter at the times `tau`.

    `tau` is `[T]`, one time per image or a single one for all; each parameter has its own width
    `D`. The value of a parameter at time τ is `p1 + s·(p0 − p1)`, where
    `s = sigmoid((w + 1)·τ + b)`. Only the reference has a gradient with respect to `tau`.
    Raises ValueError if `tau` is not one-dimensional, if the vectors differ in dtype or are not on
    the device of `tau`, if the vectors of one parameter differ in width, or if the implementation
    cannot run.
    """
    if tau.dim() != 1:
        raise ValueError(f"tau: got shape {tuple(tau.shape)}, expected [T]")
    check_floating(tau=tau)
    chosen = operator.select(implementation, tau)
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
        values = _run(chosen, tau, *(v for kind in kinds for v in kind))
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
    """Return why no kernel can run on these arguments, or None if one can.

    `operator.why_not` sees only the dtype and device of `tau`.
    """
    if tau.requires_grad and torch.is_grad_enabled():
        return "it has no gradient with respect to tau"
    if vector.dtype not in KERNEL_DTYPES:
        return f"parameters are {dtype_name(vector.dtype)}"
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
_fwd = operator.define("fwd", f"(Tensor tau, {_VECTORS}) -> Tensor", _fwd_shapes)
_bwd = operator.define("bwd", f"(Tensor dvalues, Tensor tau, {_VECTORS}) -> Tensor", _bwd_shapes)


def _by_kind(vectors: Sequence[Tensor]) -> list[list[Tensor]]:
    count = len(vectors) // 4
    return [list(vectors[i * count : (i + 1) * count]) for i in range(4)]


def _forward(ctx: Any, implementation: str, tau: Tensor, *vectors: Tensor) -> Tensor:
    ctx.save_for_backward(tau, *vectors)
    ctx.implementation = implementation
    return _fwd[implementation](tau, *_by_kind(vectors))


def _backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor | None, ...]:
    tau, *vectors = ctx.saved_tensors
    kinds = _by_kind(vectors)
    grads = _bwd[ctx.implementation](dvalues, tau, *kinds)
    widths = [v.shape[0] for v in kinds[0]]
    return None, None, *(grad for kind in grads for grad in kind.split(widths))


_run = differentiable(_forward, _backward)
