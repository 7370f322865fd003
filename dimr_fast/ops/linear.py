"""Linear layers of one input, or of several inputs as one, as a single product each way."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dimr_fast.ops._checks import compute_dtype


def linear(inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """`x · Wᵀ + b`, for inputs side by side in `x` and layers one above the other in `W` and `b`.

    `inputs` are `[…, d]`, `weights` `[D, Σd]` and `biases` `[D]`, one a weight or none at all; the
    result `[…, ΣD]` has the dtype of the first input or, under autocast, autocast's. No input is
    concatenated, and no input's gradient is cut out of a larger one.
    """
    dtype = compute_dtype(inputs[0])
    return _Linear.apply(dtype, len(inputs), len(weights), *inputs, *weights, *biases)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        # Without gradients torch.compile leaves out `ctx` if there are as many arguments as names.
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

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
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


def _stacked(parameters: list[Tensor], dtype: torch.dtype) -> Tensor:
    """One above the other, in `dtype`."""
    if len(parameters) == 1:
        return parameters[0].to(dtype)
    if parameters[0].dtype == dtype:
        return torch.cat(parameters)
    # Each is cast to where it belongs.
    rows = [len(p) for p in parameters]
    stacked = parameters[0].new_empty((sum(rows), *parameters[0].shape[1:]), dtype=dtype)
    for piece, parameter in zip(stacked.split(rows), parameters, strict=True):
        piece.copy_(parameter)
    return stacked


def _transposed_product(dy: Tensor, x: Tensor) -> Tensor:
    """`dyᵀ · x`."""
    if dy.device.type == "cpu" and x.shape[1] < dy.shape[1]:
        # In half precision torch copies a transposed first operand on a CPU: the narrower one.
        return (x.mT @ dy).mT
    return dy.mT @ x
