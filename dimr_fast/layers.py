"""The modules of a branch; parameters have the published names.

A forward pass receives time as `td`: the values of all time-dependent parameters of the model at
the times of the batch (`ops.td_parameters`, computed once per forward pass). Each `TDParameter`
has an index into `td`, so no module keeps state between calls.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint

from dimr_fast import ops
from dimr_fast.config import BranchConfig

TDValues = Sequence[Tensor]
"""The value `[T, D]` of each time-dependent parameter, in the order of `TDParameter.index`."""
Normed = Tensor | tuple[Tensor, Tensor]
"""The result of a norm: the normed features or, with a residual, the sum and the normed sum. With
layers, these have been applied to the normed features."""


class Operation(nn.Module):
    """A module that runs one operator with the implementation that an attribute names."""

    operator: str
    implementation: str = "auto"


class Steps(nn.Sequential):
    """An `nn.Sequential` of the published model: the same children at the same indices.

    Subclasses compute several steps at once, in a `forward` with further arguments. `nn.Identity`
    is in the place of a published child without parameters.
    """

    def __getitem__(self, index: Any) -> Any:
        """Return the child at `index`; TypeError for a slice, which could not be called."""
        if isinstance(index, slice):
            raise TypeError(f"index: got {index}, expected a number; list(steps) can be sliced")
        return super().__getitem__(index)


class Linear(nn.Linear):
    """`nn.Linear` with the published initialisation: truncated normal (std 0.02), zero bias.

    `forward` also takes the input in several pieces along the last axis.
    """

    implementation = "auto"

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, *inputs: Tensor) -> Tensor:
        if is_quantised(self):
            return F.linear(torch.cat(inputs, -1), self.weight, self.bias)
        biases = [] if self.bias is None else [self.bias]
        return ops.linear(inputs, [self.weight], biases, implementation=self.implementation)


def weights_and_biases(layers: Sequence[Linear]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights and the biases of linear layers, as operators take them."""
    return [m.weight for m in layers], [m.bias for m in layers if m.bias is not None]


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_quantised(layer: nn.Module) -> bool:
    """Return True if the weight is a tensor subclass, such as those of quantising libraries.

    PyTorch's functions know what to do with it, operators do not.
    """
    return is_subclass(layer.weight)


def is_subclass(tensor: Any) -> bool:
    """Return True for a tensor made of others: quantised, or FSDP2's shard of a parameter."""
    return hasattr(tensor, "__tensor_flatten__")


def is_plain(layer: nn.Module) -> bool:
    """Return True if the weights of a linear layer, convolution or embedding are all that it does.

    Otherwise the layer is called: it was replaced, as adapters do it, is parametrised or quantised,
    or has hooks.
    """
    stock = type(layer) in (Linear, nn.Conv2d, Embedding)
    return stock and not _has_hooks(layer) and not is_quantised(layer)


class Embedding(nn.Embedding):
    """`nn.Embedding` with the published initialisation: truncated normal (std 0.02)."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, y: Tensor) -> Tensor:
        """Return the vector of each label; ValueError for a label out of range.

        That is so on a CPU: on a GPU a check would have to wait for the device.
        """
        try:
            return super().forward(y)
        except IndexError as error:
            count = self.num_embeddings
            outside = y[(y < 0) | (y >= count)].flatten()[0]
            raise ValueError(f"y: got {outside}, expected 0..{count - 1}") from error


class TDParameter(nn.Module):
    """A time-dependent parameter of width D (paper eq. 4–5), stored as four vectors.

    `initial` is its value before training: 1 for a scale, 0 for a shift. `DiMR` assigns `index`,
    the index of the parameter in `TDValues`.
    """

    index: int

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.param0 = nn.Parameter(torch.full((dim,), initial))
        self.param1 = nn.Parameter(torch.full((dim,), initial))
        self.nodecay_weight = nn.Parameter(torch.zeros(dim))
        self.nodecay_bias = nn.Parameter(torch.zeros(dim))

    @property
    def vectors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.param0, self.param1, self.nodecay_weight, self.nodecay_bias


class TDValuesOnUse(Sequence[Tensor]):
    """`TDValues` that are computed one by one, when a module reads them.

    FSDP2 gathers the parameters of a block only while that block runs.
    """

    def __init__(self, tau: Tensor, parameters: Sequence[TDParameter], implementation: str) -> None:
        self.tau, self.parameters, self.implementation = tau, parameters, implementation

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, index: Any) -> Any:
        vectors = [self.parameters[index].vectors]
        return ops.td_parameters(self.tau, vectors, implementation=self.implementation)[0]


class Norm(Operation):
    """A norm over the last axis, by the operator that `operator` names."""

    def values(self, td: TDValues) -> tuple[Tensor, ...]:
        """Return the operator's parameters: the scale and, if it has one, the shift."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        td: TDValues,
        residual: Tensor | None = None,
        layers: Sequence[Linear] = (),
    ) -> Normed:
        run = getattr(ops, self.operator)
        parameters = (*self.values(td), residual, *weights_and_biases(layers))
        return run(x, *parameters, implementation=self.implementation)


class TDLayerNorm(Norm):
    """`ops.td_layer_norm` over the last axis ("LN")."""

    operator = "td_layer_norm"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = TDParameter(dim, 1.0)
        self.bias = TDParameter(dim, 0.0)

    def values(self, td: TDValues) -> tuple[Tensor, Tensor]:
        """Return the scale and the shift, each `[T, D]`."""
        return td[self.weight.index], td[self.bias.index]


class TDRMSNorm(Norm):
    """`ops.td_rms_norm` over the last axis ("TDRMSN", the published models' norm)."""

    operator = "td_rms_norm"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = TDParameter(dim, 1.0)

    def value(self, td: TDValues) -> Tensor:
        """Return the scale `[T, D]`."""
        return td[self.scale.index]

    def values(self, td: TDValues) -> tuple[Tensor]:
        return (self.value(td),)


class RMSNorm(Norm):
    """`ops.rms_norm` over the last axis ("RMSN"); it does not depend on time."""

    operator = "rms_norm"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def value(self, td: TDValues) -> Tensor:
        """Return the scale `[1, D]`."""
        return self.scale[None]

    def values(self, td: TDValues) -> tuple[Tensor]:
        return (self.scale,)


NORMS: dict[str, type[TDLayerNorm] | type[TDRMSNorm] | type[RMSNorm]] = {
    "TDRMSN": TDRMSNorm,
    "LN": TDLayerNorm,
    "RMSN": RMSNorm,
}


def _norm_and_layers(
    norm: nn.Module,
    layers: Sequence[Linear],
    x: Tensor,
    td: TDValues,
    residual: Tensor | None = None,
) -> Normed:
    """Return the results of linear layers after a norm, along the last axis.

    One operator computes them, unless a module was replaced or has hooks.
    """
    if isinstance(norm, Norm) and not _has_hooks(norm) and all(map(is_plain, layers)):
        return norm(x, td, residual, layers)
    normed = norm(x, td) if residual is None else norm(x, td, residual)
    summed, normed = (x, normed) if residual is None else normed
    y = torch.cat([layer(normed) for layer in layers], -1)
    return y if residual is None else (summed, y)


class Attention(Operation):
    """Pre-norm self-attention without the residual add."""

    operator = "attention"

    def __init__(self, config: BranchConfig, norm_type: str) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.norm = NORMS[norm_type](config.dim)
        self.query_key_value = Linear(config.dim, 3 * config.dim, bias=False)
        self.dense = Linear(config.dim, config.dim)

    def forward(self, x: Tensor, td: TDValues) -> Tensor:
        qkv = cast(Tensor, _norm_and_layers(self.norm, [self.query_key_value], x, td))
        return self.dense(ops.attention(qkv, self.num_heads, implementation=self.implementation))


class DepthwiseConv2d(Operation, Steps):
    """`ops.depthwise_conv2d` of a branch's features `[B, H·W, D]`; `residual=True` adds them."""

    operator = "depthwise_conv2d"

    def __init__(self, config: BranchConfig) -> None:
        k = config.kernel_size
        conv = nn.Conv2d(config.dim, config.dim, k, padding=k // 2, groups=config.dim)
        super().__init__(nn.Identity(), conv, nn.Identity())
        self.size = (config.max_height, config.max_width)

    def forward(  # type: ignore[override]
        self, x: Tensor, td: TDValues, residual: bool = False
    ) -> Tensor:
        conv = self[1]
        image = x.unflatten(1, self.size)
        if not is_plain(conv):
            y = conv(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
            return x + y if residual else y
        return ops.depthwise_conv2d(
            image, conv.weight, conv.bias, residual=residual, implementation=self.implementation
        ).flatten(1, 2)


class GatedMLP(Operation):
    """Pre-norm `w2(gelu(w0(x)) · w1(x))` (paper section 3.3).

    Returns `(s, output)` of `s = x` or, with a residual, `s = residual + x`; the norm's kernel also
    computes this sum.
    """

    operator = "gated_gelu"

    def __init__(self, config: BranchConfig, norm_type: str) -> None:
        super().__init__()
        self.norm = NORMS[norm_type](config.dim)
        self.w0 = Linear(config.dim, config.hidden_dim)
        self.w1 = Linear(config.dim, config.hidden_dim)
        self.w2 = Linear(config.hidden_dim, config.dim)

    def forward(
        self, x: Tensor, td: TDValues, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        s, hidden = self.hidden(x, td, residual)
        return s, self.output(hidden)

    def hidden(
        self, x: Tensor, td: TDValues, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return `s` and `[w0(norm(s)), w1(norm(s))]` along the last axis."""
        found = _norm_and_layers(self.norm, [self.w0, self.w1], x, td, residual)
        return found if isinstance(found, tuple) else (x, found)

    def output(self, hidden: Tensor) -> Tensor:
        """Return the MLP's output from `hidden`."""
        layers = [self.w2] if is_plain(self.w2) else []
        y = ops.gated_gelu(hidden, *weights_and_biases(layers), implementation=self.implementation)
        return y if layers else self.w2(y)


class Block(nn.Module):
    """A transformer or ConvNeXt block on `[B, N, D]`: mixes positions, then channels."""

    def __init__(self, config: BranchConfig, norm_type: str) -> None:
        super().__init__()
        transformer = config.block_type == "TransformerBlock"
        self.block1 = Attention(config, norm_type) if transformer else DepthwiseConv2d(config)
        self.block2 = GatedMLP(config, norm_type)
        self.dropout = nn.Dropout(config.dropout_prob)

    def forward(self, x: Tensor, td: TDValues, keep_products: bool = False) -> Tensor:
        """Return the block's result.

        With `keep_products`, backward has the results of matrix products and computes the rest
        again.
        """
        if keep_products:
            return self._checkpointed(x, td)
        x, increment = self.block2(*self._mixed(x, td))
        return x + self.dropout(increment)

    def _checkpointed(self, x: Tensor, td: TDValues) -> Tensor:
        # The last product lies outside what is computed again: its result is not needed.
        x, hidden = checkpoint.checkpoint(
            self._hidden, x, td, use_reentrant=False, context_fn=_keep_products
        )
        return x + self.dropout(self.block2.output(hidden))

    def _mixed(self, x: Tensor, td: TDValues) -> tuple[Tensor, TDValues, Tensor | None]:
        """Mix positions; return the arguments of `block2`."""
        if isinstance(self.block1, DepthwiseConv2d) and not self.dropout.p:
            return self.block1(x, td, residual=True), td, None
        return self.dropout(self.block1(x, td)), td, x

    def _hidden(self, x: Tensor, td: TDValues) -> tuple[Tensor, Tensor]:
        return self.block2.hidden(*self._mixed(x, td))


def _keep_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return checkpoint.create_selective_checkpoint_contexts(_products)


_products: list[Any] = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
if torch.backends.mkldnn.is_available():
    _products.append(torch.ops.mkldnn._linear_pointwise.default)
"""The matrix products of `ops.linear`."""


class PositionEmbedding(nn.Module):
    """Adds a learned vector to every position of `[B, H·W, D]` (row-major)."""

    def __init__(self, config: BranchConfig) -> None:
        super().__init__()
        self.position_embeddings = Embedding(config.max_height * config.max_width, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        embeddings = self.position_embeddings
        # Called only if it must be: the indices are all positions in their order.
        vectors = (
            embeddings.weight
            if is_plain(embeddings)
            else embeddings(torch.arange(x.shape[1], device=x.device))
        )
        # In the dtype of x: under autocast the whole residual stream is in autocast's dtype.
        return x + vectors.to(x.dtype)


class PatchEmbedding(Steps):
    """Embeds the full-resolution image `[B, C, H, W]` as positions `[B, h·w, D]` of a branch."""

    def __init__(self, config: BranchConfig, channels: int) -> None:
        r = config.input_feature_ratio
        conv = nn.Conv2d(channels, config.dim, r, stride=r)
        super().__init__(nn.Identity(), conv, nn.Identity(), PositionEmbedding(config))

    def forward(self, x: Tensor) -> Tensor:
        conv = self[1]
        if not is_plain(conv):
            return self[3](conv(x).flatten(2).mT)
        # A convolution whose stride equals its size is a linear layer on patches. Computed as one,
        # its result is channels-last, the layout of all features.
        r = conv.stride[0]
        patches = x.unflatten(3, (-1, r)).unflatten(2, (-1, r)).permute(0, 2, 4, 1, 3, 5)
        features = F.linear(patches.flatten(3).flatten(1, 2), conv.weight.flatten(1), conv.bias)
        return self[3](features)


class Head(Steps):
    """Predicts a branch's noise `[B, C, h, w]` from its last features `[B, h·w, D]`."""

    def __init__(self, config: BranchConfig, channels: int) -> None:
        k = config.final_kernel_size
        conv = nn.Conv2d(config.dim, channels, k, padding=k // 2)
        super().__init__(TDLayerNorm(config.dim), nn.Identity(), conv)
        self.size = (config.max_height, config.max_width)

    def forward(self, x: Tensor, td: TDValues) -> Tensor:  # type: ignore[override]
        return self[2](self[0](x, td).mT.unflatten(2, self.size))


class _Projection(nn.Module):
    """The linear layer of the cascade under its published name."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.kernel = Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x)


class UpsampleAdd(Operation, Steps):
    """`ops.upsample_add`: adds a branch's upsampled features to the next branch's embedding."""

    operator = "upsample_add"

    def __init__(self, low: BranchConfig, config: BranchConfig) -> None:
        in_features = low.dim * (2 * (low.num_blocks // 2) + 2)
        q = config.max_height // low.max_height
        super().__init__(
            TDLayerNorm(in_features),
            _Projection(in_features, config.dim * q * q),
            TDLayerNorm(config.dim),
        )
        self.low_size = (low.max_height, low.max_width)
        self.size = (config.max_height, config.max_width)

    @property
    def norm_in(self) -> TDLayerNorm:
        """The norm of the concatenated features."""
        return self[0]

    @property
    def kernel(self) -> Linear:
        """The projection of the normed features."""
        return self[1].kernel

    @property
    def norm_out(self) -> TDLayerNorm:
        """The norm of the upsampled features."""
        return self[2]

    def forward(  # type: ignore[override]
        self, x: Tensor, features: Sequence[Tensor], td: TDValues
    ) -> Tensor:
        if not is_plain(self.kernel) or any(map(_has_hooks, self)):
            return self._called_as_modules(x, features, td)
        return ops.upsample_add(
            x.unflatten(1, self.size),
            [f.unflatten(1, self.low_size) for f in features],
            self.norm_in.values(td),
            self.kernel.weight,
            self.kernel.bias,
            self.norm_out.values(td),
            implementation=self.implementation,
        ).flatten(1, 2)

    def _called_as_modules(self, x: Tensor, features: Sequence[Tensor], td: TDValues) -> Tensor:
        normed = cast(Tensor, self.norm_in(torch.cat(list(features), -1), td))
        y = self[1](normed)
        height, width = self.low_size
        q = self.size[0] // height
        # Channels [row, column, D] of a box become q × q positions.
        boxes = y.view(len(y), height, width, q, q, -1).transpose(2, 3)
        return x + cast(Tensor, self.norm_out(boxes.reshape(x.shape), td))
