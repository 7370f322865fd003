"""Several linear layers on one input, or one on a concatenated input, as one matrix product."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dimr_fast.ops._checks import compute_dtype
from dimr_fast.ops.registration import differentiable


def linear(inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Compute `x · Wᵀ + b`, where `x`, `W` and `b` are concatenations of the arguments.

    `x` concatenates `inputs` (each `[…, d]`) along the last axis, `W` concatenates `weights` (each
    `[D, Σd]`) and `b` concatenates `biases` (each `[D]`; one per weight or none) along the first.
    The result `[…, ΣD]` has the dtype of the first input; under autocast the autocast dtype. The
    inputs and their gradients are never concatenated in memory.
    """
    dtype = compute_dtype(inputs[0])
    return _run(dtype, len(inputs), len(weights), *inputs, *weights, *biases)


def _forward(ctx: Any, *given: Any) -> Tensor:
    # The inputs are one `*given` on purpose: with named parameters, torch.compile does not pass
    # `ctx` if no input needs a gradient.
    dtype, inputs, layers, *tensors = given
    xs, weights = tensors[:inputs], tensors[inputs : inputs + layers]
    biases = tensors[inputs + layers :]
    rows = [x.to(dtype).flatten(0, -2) for x in xs]
    weight = _stacked(weights, dtype)
    (first, *others), (w, *ws) = rows, weight.split([x.shape[1] for x in rows], 1)
    y = torch.addmm(_stacked(biases, dtype), first, w.mT) if biases else first @ w.mT
    for x, w in zip(others, ws, strict=True):
        y.addmm_(x, w.mT)
    ctx.save_for_backward(weight, *rows)
    ctx.inputs = [(x.shape, x.dtype) for x in xs]
    ctx.heights, ctx.dtype = [len(w) for w in weights], weights[0].dtype
    return y.view(*xs[0].shape[:-1], len(weight))


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, *rows = ctx.saved_tensors
    dy = dy.reshape(-1, dy.shape[-1])
    widths = [x.shape[1] for x in rows]
    wanted = ctx.needs_input_grad[3:]
    grads: list[Tensor | None] = [
        (dy @ w).to(dtype).view(shape) if needed else None
        for w, (shape, dtype), needed in zip(
            weight.split(widths, 1), ctx.inputs, wanted, strict=False
        )
    ]
    layers = len(ctx.heights)
    if any(wanted[len(rows) : len(rows) + layers]):
        dweight = weight.new_empty(weight.shape, dtype=ctx.dtype)
        for x, piece in zip(rows, dweight.split(widths, 1), strict=True):
            piece.copy_(_transposed_product(dy, x))
        grads += dweight.split(ctx.heights)
    else:
        grads += [None] * layers
    if any(wanted[len(rows) + layers :]):
        grads += dy.sum(0).to(ctx.dtype).split(ctx.heights)
    else:
        grads += [None] * (len(wanted) - len(grads))
    return None, None, None, *grads


_run = differentiable(_forward, _backward)


def _stacked(parameters: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Concatenate along the first axis and cast to `dtype`."""
    if len(parameters) == 1:
        return parameters[0].to(dtype)
    if parameters[0].dtype == dtype:
        return torch.cat(parameters)
    # Cast each directly into its place: no second copy.
    rows = [len(p) for p in parameters]
    stacked = parameters[0].new_empty((sum(rows), *parameters[0].shape[1:]), dtype=dtype)
    for piece, parameter in zip(stacked.split(rows), parameters, strict=True):
        piece.copy_(parameter)
    return stacked


def _transposed_product(dy: Tensor, x: Tensor) -> Tensor:
    """Return `dyᵀ · x`."""
    if dy.device.type == "cpu" and x.shape[1] < dy.shape[1]:
        # In half precision PyTorch copies a transposed first operand on a CPU. This is the
        # narrower one.
        return (x.mT @ dy).mT
    return dy.mT @ x
