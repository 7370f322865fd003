"""A branch of a model optimised for inference that runs as one operator of the CPU library."""

import copy
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dimr_fast import ops
from dimr_fast.layers import (
    Attention,
    Block,
    Linear,
    Operation,
    RMSNorm,
    TDLayerNorm,
    TDRMSNorm,
    TDValues,
)
from dimr_fast.model import Branch, DiMR

FACTORS = {
    torch.bfloat16: ops.Factors.BFLOAT16,
    torch.float16: ops.Factors.FLOAT32,
    torch.float32: ops.Factors.FLOAT32,
}
"""The factors of the CPU library's products. It has none in float16, and no processor gains."""


def uses_cpu_library(model: DiMR, dtype: torch.dtype) -> bool:
    """Return whether the CPU library can run every operator of every branch, and may."""
    for stage in model.stages:
        branch = cast(Branch, stage)
        positions = branch.input_layer.get_parameter("3.position_embeddings.weight")
        count, width = positions.shape
        for module in branch.modules():
            if isinstance(module, Operation):
                shape: tuple[int, ...] = (1, count, width)
                if isinstance(module, Attention):
                    shape = (1, count + 1, 3, module.num_heads, width // module.num_heads)
                x = torch.empty(shape, dtype=dtype, device=positions.device)
                named = module.implementation not in ("auto", "cpu")
                if named or ops.OPERATORS[module.operator].why_not("cpu", x) is not None:
                    return False
    return True


class CPUFeatures(NamedTuple):
    """The features of a branch, in the arrangement of `ops.branch`."""

    first: Tensor
    pairs: Tensor
    last: Tensor

    def of_batch(self, batch: int) -> "CPUFeatures":
        """Return the part of the memory for a smaller batch."""
        return CPUFeatures(self.first[:batch], self.pairs[:, :batch], self.last[:batch])


class CPUBranch(nn.Module):
    """`model.Branch` by one call of `ops.branch`, with weights in its layout."""

    def __init__(self, branch: Branch, dtype: torch.dtype, factors: ops.Factors) -> None:
        super().__init__()
        self.depth = branch.depth
        self.is_transformer = branch.is_transformer
        block = cast(Block, branch.blocks[0])
        self.heads = block.block1.num_heads if isinstance(block.block1, Attention) else 0
        self.layer_norm = isinstance(block.block2.norm, TDLayerNorm)
        self.parameters_in_order = nn.ParameterList(
            nn.Parameter(tensor, requires_grad=False)
            for tensor in _arguments(branch, dtype, factors)
        )
        # Going through a ParameterList takes microseconds per parameter.
        self.arguments = list(self.parameters_in_order)
        self.norms = [value for norm in _norms(branch) for value in _values(norm)]
        if self.is_transformer:
            self.class_embeds = copy.deepcopy(branch.class_embeds).requires_grad_(False).to(dtype)

    def allocate(self, batch: int) -> CPUFeatures:
        """Return memory for the features of a batch."""
        positions = self.arguments[1]
        count, width = positions.shape
        shape = batch, count + self.is_transformer, width
        first, last = (positions.new_empty(shape) for _ in range(2))
        return CPUFeatures(first, positions.new_empty(self.depth, batch, shape[1], 2, width), last)

    def forward(
        self,
        image: Tensor,
        lower: CPUFeatures | None,
        y: Tensor,
        td: TDValues,
        memory: CPUFeatures,
        predicts: bool,
    ) -> tuple[Tensor | None, CPUFeatures]:
        """Return the prediction, if wanted, and the features, which are stored in `memory`."""
        prediction = ops.branch(
            image,
            *memory,
            lower or (),
            self.class_embeds(y) if self.is_transformer else None,
            [td[value] if isinstance(value, int) else value for value in self.norms],
            self.arguments,
            heads=self.heads,
            layer_norm=self.layer_norm,
            predicts=predicts,
        )
        return prediction if predicts else None, memory


def _values(norm: nn.Module) -> tuple[int | Tensor, ...]:
    """Return the indices in `TDValues` of a norm's scale and shift, or its constant scale."""
    if isinstance(norm, TDLayerNorm):
        return norm.weight.index, norm.bias.index
    if isinstance(norm, TDRMSNorm):
        return (norm.scale.index,)
    return (cast(RMSNorm, norm).scale.detach()[None].float().clone(),)


def _norms(branch: Branch) -> Iterator[nn.Module]:
    """Yield the norms of a branch in the order of use."""
    if hasattr(branch, "upsample"):
        yield branch.upsample.norm_in
        yield branch.upsample.norm_out
    for module in branch.blocks:
        block = cast(Block, module)
        if isinstance(block.block1, Attention):
            yield block.block1.norm
        yield block.block2.norm
    yield branch.output_layer[0]


def _arguments(branch: Branch, dtype: torch.dtype, factors: ops.Factors) -> Iterator[Tensor]:
    """Yield the parameters in the order of `ops.branch`.

    The first and the last layer are small, and their errors reach the prediction undiminished: they
    compute in float32.
    """
    precise = ops.Factors.FLOAT32

    def pack(linear: nn.Linear) -> Tensor:
        return _pack(linear.weight, linear.bias, factors)

    convolution = cast(nn.Conv2d, branch.input_layer[1])
    positions = branch.input_layer.get_parameter("3.position_embeddings.weight")
    yield _pack(convolution.weight.flatten(1), convolution.bias, precise)
    yield positions.to(dtype, copy=True)
    if hasattr(branch, "upsample"):
        yield pack(branch.upsample.kernel)
    for j, module in enumerate(branch.blocks):
        block = cast(Block, module)
        if j > branch.depth:
            yield pack(cast(Linear, branch.skip_denses[j - branch.depth - 1]))
        if isinstance(block.block1, Attention):
            yield pack(block.block1.query_key_value)
            yield pack(block.block1.dense)
        else:
            for parameter in block.block1.parameters():
                yield parameter.to(dtype, copy=True)
        mlp = block.block2
        weight = torch.cat([mlp.w0.weight, mlp.w1.weight])
        yield _pack(weight, torch.cat([mlp.w0.bias, mlp.w1.bias]), factors, gated=True)
        yield pack(mlp.w2)
    head = cast(nn.Conv2d, branch.output_layer[2])
    # Rows of the channels of the prediction, then of the taps of the filter.
    yield _pack(head.weight.permute(0, 2, 3, 1).flatten(0, 2), None, precise)
    yield cast(Tensor, head.bias).float().clone()


def _pack(
    weight: Tensor, bias: Tensor | None, factors: ops.Factors, *, gated: bool = False
) -> Tensor:
    bias = None if bias is None else bias.float()
    return ops.pack_linear(weight.float(), bias, factors, gated=gated)
