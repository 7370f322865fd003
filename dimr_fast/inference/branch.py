"""A branch of a model optimised for inference that runs operator by operator."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, Self, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimr_fast import ops
from dimr_fast.inference.fp8 import FP8Linear, FP8Norm, implementation_in_fp8
from dimr_fast.layers import (
    Attention,
    Block,
    DepthwiseConv2d,
    GatedMLP,
    RMSNorm,
    TDParameter,
    TDRMSNorm,
    TDValues,
)
from dimr_fast.model import Branch

Module = TypeVar("Module", bound=nn.Module)


class Buffers(NamedTuple):
    """Memory for a branch's features between blocks, arranged so that nothing is concatenated.

    A skip connection joins the output of an earlier block to the input of a later one. The two are
    the halves of one tensor. `pairs` `[num_blocks // 2, B, tokens, 2, D]` stores the outputs of all
    blocks except the last. `tokens` `[B, tokens, D]` is the input of a transformer's first block:
    the class token and the positions.
    """

    pairs: Tensor
    tokens: Tensor

    def of_batch(self, batch: int) -> "Buffers":
        """Return the part of the buffers for a smaller batch."""
        return Buffers(self.pairs[:, :batch], self.tokens[:batch])

    def slot(self, block: int) -> Tensor | None:
        """Return the memory for the output of a block, None for the last block."""
        depth = len(self.pairs)
        if block == 2 * depth:
            return None
        pair, half = (depth - 1 - block, 1) if block < depth else (block - depth, 0)
        return self.pairs[pair].select(-2, half)


class OperatorBranch(nn.Module):
    """`model.Branch` that keeps its features in `Buffers`."""

    def __init__(self, branch: Branch, dtype: torch.dtype, fp8: bool) -> None:
        super().__init__()
        self.depth = branch.depth
        self.is_transformer = branch.is_transformer
        self.input_layer = _copy(branch.input_layer, dtype)
        if self.is_transformer:
            self.class_embeds = _copy(branch.class_embeds, dtype)
        if hasattr(branch, "upsample"):
            self.upsample = _copy(branch.upsample, dtype)
        self.blocks = nn.ModuleList(
            _Block(cast(Block, block), dtype, fp8) for block in branch.blocks
        )
        self.skip_denses = nn.ModuleList(
            _Linear.of(cast(nn.Linear, dense), dtype) for dense in branch.skip_denses
        )
        self.output_layer = _copy(branch.output_layer, dtype)

    def allocate(self, batch: int) -> Buffers:
        positions = self.input_layer.get_parameter("3.position_embeddings.weight")
        count, width = positions.shape
        count += self.is_transformer
        tokens = (batch, count, width) if self.is_transformer else (batch, 0, width)
        pairs = positions.new_empty(self.depth, batch, count, 2, width)
        return Buffers(pairs, positions.new_empty(tokens))

    def forward(
        self,
        image: Tensor,
        features: Sequence[Tensor] | None,
        y: Tensor,
        td: TDValues,
        buffers: Buffers,
        predicts: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return the prediction, if wanted, and the features `[B, h·w, D]` for the next branch.

        The features are the input embedding and the output of each block.
        """
        x = self.input_layer(image)
        if features:
            x = self.upsample(x, features, td)
        if self.is_transformer:
            buffers.tokens[:, 0] = self.class_embeds(y)
            buffers.tokens[:, 1:] = x
            x = buffers.tokens
        outputs = [x]
        for j, block in enumerate(self.blocks):
            if j > self.depth:
                pair = j - self.depth - 1
                x = self.skip_denses[pair](buffers.pairs[pair].flatten(-2))
            x = block(x, td, buffers.slot(j))
            outputs.append(x)
        if self.is_transformer:
            outputs = [output[:, 1:] for output in outputs]
        return self.output_layer(outputs[-1], td) if predicts else None, outputs


class _Block(nn.Module):
    """`layers.Block` that writes its result to `out`, if given."""

    def __init__(self, block: Block, dtype: torch.dtype, fp8: bool) -> None:
        super().__init__()
        if isinstance(block.block1, Attention):
            self.block1: nn.Module = _attention(block.block1, dtype, fp8)
        else:
            self.block1 = _copy(block.block1, dtype)
        self.block2 = _GatedMLP(block.block2, dtype, fp8)

    def forward(self, x: Tensor, td: TDValues, out: Tensor | None) -> Tensor:
        if isinstance(self.block1, DepthwiseConv2d):
            return self.block2(self.block1(x, td, residual=True), td, None, out)
        return self.block2(self.block1(x, td), td, x, out)


class _GatedMLP(nn.Module):
    """`layers.GatedMLP` with its input projections merged, including the residual add."""

    def __init__(self, mlp: GatedMLP, dtype: torch.dtype, fp8: bool) -> None:
        super().__init__()
        self.implementation = mlp.implementation
        self.gate: Any = ops.gated_gelu
        self.norm: nn.Module = _copy(mlp.norm, dtype)
        if fp8:
            self.implementation = implementation_in_fp8("gated_gelu", mlp.implementation)
            self.gate = ops.gated_gelu_fp8
            self.norm = FP8Norm(self.norm)
        linear = FP8Linear if fp8 else _Linear
        self.w01 = linear(
            torch.cat([mlp.w0.weight, mlp.w1.weight]), torch.cat([mlp.w0.bias, mlp.w1.bias]), dtype
        )
        self.w2 = linear.of(mlp.w2, dtype)

    def forward(
        self, x: Tensor, td: TDValues, residual: Tensor | None, out: Tensor | None
    ) -> Tensor:
        """Return `s + MLP(norm(s))`, where `s = x (+ residual)`; write it to `out`, if given."""
        if out is not None and self._adds_in_place(x):
            norm = cast(TDRMSNorm | RMSNorm, self.norm)
            normed = ops.td_rms_norm_into(out, x, norm.value(td), residual, self.w2.bias)
            # The matrix product adds to `out` in place. A separate add would read two more tensors.
            rows = out.view(-1, out.shape[-1])
            rows.addmm_(self._hidden(normed).flatten(0, 1), self.w2.weight.mT)
            return out
        normed = self.norm(x, td, residual)
        if residual is not None:
            x, normed = normed
        return torch.add(x, self.w2(self._hidden(normed)), out=out)

    def _hidden(self, normed: Tensor) -> Tensor:
        return self.gate(self.w01(normed), implementation=self.implementation)

    def _adds_in_place(self, x: Tensor) -> bool:
        if not isinstance(self.norm, TDRMSNorm | RMSNorm) or self.w2.uses_onednn:
            return False
        operator = ops.OPERATORS[self.norm.operator]
        return operator.select(self.norm.implementation, x) == "triton"


def _attention(attention: Attention, dtype: torch.dtype, fp8: bool) -> "PaddedAttention":
    """Return a copy; on a GPU its heads are padded to multiples of 16 bytes, the widest load."""
    head_dim = attention.dense.weight.shape[1] // attention.num_heads
    multiple = 1
    if attention.dense.weight.device.type == "cuda":
        # In FP8 the width of all heads together must be a multiple of 16.
        multiple = 16 if fp8 and attention.num_heads % 2 else 8
    return PaddedAttention(attention, head_dim + -head_dim % multiple, dtype, fp8)


class PaddedAttention(nn.Module):
    """`layers.Attention` with heads padded by zero weights, which computes the same.

    Wider heads have a smaller scale `head_dim^-½`; the weights of the queries compensate for it
    before they are rounded to `dtype`.
    """

    def __init__(
        self, attention: Attention, head_dim: int, dtype: torch.dtype, fp8: bool = False
    ) -> None:
        super().__init__()
        self.implementation = attention.implementation
        self.num_heads = attention.num_heads
        qkv = attention.query_key_value.weight.unflatten(0, (3, self.num_heads, -1))
        dense = attention.dense.weight.unflatten(1, (self.num_heads, -1))
        narrow = qkv.shape[2]
        if head_dim != narrow:
            scale = qkv.new_tensor([(head_dim / narrow) ** 0.5, 1, 1]).view(3, 1, 1, 1)
            qkv = F.pad(qkv * scale, (0, 0, 0, head_dim - narrow))
            dense = F.pad(dense, (0, head_dim - narrow))
        norm = _copy(attention.norm, dtype)
        self.norm: nn.Module = FP8Norm(norm) if fp8 else norm
        self.query_key_value = (FP8Linear if fp8 else _Linear)(qkv.flatten(0, 2), None, dtype)
        self.dense = _Linear(dense.flatten(1), attention.dense.bias, dtype)

    def forward(self, x: Tensor, td: TDValues) -> Tensor:
        qkv = self.query_key_value(self.norm(x, td))
        return self.dense(ops.attention(qkv, self.num_heads, implementation=self.implementation))


class _Linear(nn.Linear):
    """`nn.Linear` with given weights in `dtype`.

    In bfloat16 on a CPU, `forward` calls oneDNN directly. The weight is stored in oneDNN's layout;
    PyTorch would convert it at every call. The bias is passed to oneDNN; PyTorch would first copy
    it to every row of the result.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.to(dtype, copy=True), requires_grad=False)
        self._pack()

    def _pack(self) -> None:
        self.uses_onednn = (
            (self.weight.device.type, self.weight.dtype) == ("cpu", torch.bfloat16)
            and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        if self.uses_onednn:
            packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            self.weight = nn.Parameter(packed, requires_grad=False)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with the weight in PyTorch's layout, which can be copied."""
        if not self.uses_onednn:
            return self.__dict__
        weight = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        return {**self.__dict__, "_parameters": {**self._parameters, "weight": weight}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()

    @classmethod
    def of(cls, linear: nn.Linear, dtype: torch.dtype) -> Self:
        return cls(linear.weight, linear.bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.uses_onednn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def _copy(module: Module, dtype: torch.dtype) -> Module:
    """Return a copy without gradients: projections in `dtype`, parameters of norms in float32.

    A time-dependent parameter keeps only its index; `InferenceDiMR.td_vectors` has its vectors.
    """
    copied = copy.deepcopy(module).requires_grad_(False)
    for part in copied.modules():
        if isinstance(part, TDParameter):
            for name in [name for name, _ in part.named_parameters()]:
                delattr(part, name)
        elif isinstance(part, nn.Linear | nn.Conv2d | nn.Embedding):
            part.to(dtype)
        else:
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.float()
    return copied
