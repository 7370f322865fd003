"""Several linear layers on one input, or one on a concatenated input, as one matrix product.

Operators can end with linear layers (`td_rms_norm`, `td_layer_norm`, `gated_gelu`): then the input
of the layers is not kept for backward, since the operator's backward kernel computes it again.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dimr_fast import _extension
from dimr_fast.ops._checks import check_device, compute_dtype
from dimr_fast.ops.registration import compiled_operator, differentiable
from dimr_fast.utils.compilation import constant_result


def linear(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    implementation: str = "auto",
) -> Tensor:
    """Compute `x · Wᵀ + b`, where `x`, `W` and `b` are concatenations of the arguments.

    `x` concatenates `inputs` (each `[…, d]`) along the last axis, `W` concatenates `weights` (each
    `[D, Σd]`) and `b` concatenates `biases` (each `[D]`; one per weight or none) along the first.
    The result `[…, ΣD]` has the dtype of the first input; under autocast the autocast dtype. The
    inputs and their gradients are never concatenated in memory, except by the implementation
    "reference": plain PyTorch, with derivatives of every kind and order. The other one is "auto".
    Raises ValueError if the shape or the device of a weight or bias does not fit, or for an unknown
    implementation.
    """
    if implementation not in ("auto", "reference"):
        raise ValueError(f"implementation: got {implementation!r}, expected 'auto' or 'reference'")
    for i, x in enumerate(inputs):
        check_device(inputs[0], x, f"inputs[{i}]")
    check_layers(inputs[0], sum(x.shape[-1] for x in inputs), weights, biases)
    dtype = compute_dtype(inputs[0])
    if implementation == "reference":
        x, weight = _joined(inputs, -1).to(dtype), _joined(weights, 0).to(dtype)
        return F.linear(x, weight, _joined(biases, 0).to(dtype) if biases else None)
    return _run(dtype, len(inputs), len(weights), *inputs, *weights, *biases)


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate, without a copy of a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def check_layers(
    x: Tensor, width: int, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> None:
    """Raise ValueError if the layers do not take an input of `width` on the device of `x`."""
    if biases and len(biases) != len(weights):
        raise ValueError(f"biases: got {len(biases)}, expected none or {len(weights)}")
    for i, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ValueError(f"weights[{i}]: got {tuple(weight.shape)}, expected [D, {width}]")
        check_device(x, weight, f"weights[{i}]")
    for i, (bias, weight) in enumerate(zip(biases, weights, strict=len(biases) > 0)):
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"biases[{i}]: got {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}"
            )
        check_device(x, bias, f"biases[{i}]")


def _forward(ctx: Any, *given: Any) -> Tensor:
    # The inputs are one `*given` on purpose: with named parameters, torch.compile does not pass
    # `ctx` if no input needs a gradient.
    dtype, inputs, layers, *tensors = given
    xs = tensors[:inputs]
    y, weight, rows = layers_forward(ctx, xs, tensors[inputs:], layers, dtype)
    ctx.save_for_backward(weight, *rows)
    ctx.inputs = [(x.shape, x.dtype) for x in xs]
    return y


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, *rows = ctx.saved_tensors
    dy = dy.reshape(-1, dy.shape[-1])
    wanted = ctx.needs_input_grad[3:]
    pieces = weight.split([x.shape[1] for x in rows], 1)
    grads = [
        (dy @ w).to(dtype).view(shape) if needed else None
        for w, (shape, dtype), needed in zip(pieces, ctx.inputs, wanted, strict=False)
    ]
    return None, None, None, *grads, *layers_gradients(ctx, dy, rows, wanted[len(rows) :])


_run = differentiable(_forward, _backward)


def layers_forward(
    ctx: Any,
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    layers: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Apply linear layers in the forward pass of a differentiable function.

    `parameters` are the weights of `layers` layers, then their biases, if any. Returns the result,
    the concatenated weight in `dtype` and the inputs as rows `[N, d]` in `dtype`: what backward
    needs of them. `ctx` gets what `layers_gradients` needs besides.
    """
    weights, biases = parameters[:layers], parameters[layers:]
    rows = [x.to(dtype).flatten(0, -2) for x in inputs]
    weight = _stacked(weights, dtype)
    (first, *others), (w, *ws) = rows, weight.split([x.shape[1] for x in rows], 1)
    y = _product(first, w, _stacked(biases, dtype)) if biases else first @ w.mT
    for x, w in zip(others, ws, strict=True):
        torch.addmm(y, x, w.mT, out=y)  # unlike `addmm_`, torch.utils.flop_counter counts it
    ctx.heights, ctx.parameter_dtype = [len(w) for w in weights], weights[0].dtype
    return y.view(*inputs[0].shape[:-1], len(weight)), weight, rows


def layers_gradients(
    ctx: Any, dy: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of the layers' weights and biases that are `wanted`.

    `dy` `[…, ΣD]` is the gradient of the result; `inputs` are each `[…, d]`.
    """
    if not any(wanted):
        return [None] * len(wanted)
    dy = dy.reshape(-1, dy.shape[-1])
    rows = [x.to(dy.dtype).flatten(0, -2) for x in inputs]
    if _own_weight_gradient(dy):
        dweight, dbias = _weight_gradient(dy, rows)
    else:
        widths = [x.shape[1] for x in rows]
        dweight = dy.new_empty((dy.shape[1], sum(widths)), dtype=ctx.parameter_dtype)
        for x, piece in zip(rows, dweight.split(widths, 1), strict=True):
            piece.copy_(_transposed_product(dy, x))
        has_bias = len(wanted) > len(ctx.heights)
        dbias = dy.sum(0) if has_bias else dy.new_empty(dy.shape[1])
    grads = [
        *dweight.to(ctx.parameter_dtype).split(ctx.heights),
        *dbias.to(ctx.parameter_dtype).split(ctx.heights),
    ]
    return [grad if needed else None for grad, needed in zip(grads, wanted, strict=False)]


def _stacked(parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Concatenate along the first axis and cast to `dtype`."""
    if len(parameters) == 1:
        return parameters[0].to(dtype)
    if parameters[0].dtype == dtype:
        return torch.cat(list(parameters))
    # Cast each directly into its place: no second copy.
    rows = [len(p) for p in parameters]
    stacked = parameters[0].new_empty((sum(rows), *parameters[0].shape[1:]), dtype=dtype)
    for piece, parameter in zip(stacked.split(rows), parameters, strict=True):
        # On a CPU, copying from fp32 to fp16 loses the sign of a negated view (torch 2.14).
        piece.copy_(parameter.resolve_neg())
    return stacked


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `x · weightᵀ + bias`."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and _has_onednn():
        weight = weight.contiguous()  # oneDNN is slow on a slice
        # PyTorch writes the bias to the result before the product, which adds to it.
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.addmm(bias, x, weight.mT)


@constant_result
def _has_onednn() -> bool:
    mkldnn = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and mkldnn._is_mkldnn_bf16_supported()


_weight_gradient = compiled_operator(
    "weight_gradient", "(Tensor dy, Tensor[] inputs) -> (Tensor, Tensor)"
)


def _own_weight_gradient(dy: Tensor) -> bool:
    """Return True if the CPU library's kernel is faster than PyTorch's product and sum.

    It is on processors with AVX-512 BF16, unless they have AMX, which oneDNN uses.
    """
    return (
        dy.dtype == torch.bfloat16
        and dy.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and _extension.why_not("cpu") is None
        and _extension.instruction_set() == "AVX-512 with BF16"
    )


def _transposed_product(dy: Tensor, x: Tensor) -> Tensor:
    """Return `dyᵀ · x`."""
    if dy.device.type == "cpu" and x.shape[1] < dy.shape[1]:
        # In half precision PyTorch copies a transposed first operand on a CPU. This is the
        # narrower one.
        return (x.mT @ dy).mT
    return dy.mT @ x
