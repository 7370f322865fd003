"""Execute DiMR as the published code does: the baseline that the benchmarks compare with.

The same operations in the same order, dtypes and layouts as the authors' code (arXiv 2406.09416),
written anew in plain PyTorch:

- norms are not fused, and autocast runs them in fp32;
- q, k and v are permuted and cast to fp32;
- image layouts are permuted around each depthwise convolution;
- each skip is a concatenation; so is each branch's output, even that of the last, which is unused;
- every time-dependent parameter is computed by itself, after the host has waited for the device to
  say whether all images share one time;
- each block is checkpointed, also in sampling;
- guidance takes two passes.
"""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint

from dimr_fast import BranchConfig, DiMR, DiMRConfig

Values = list[Tensor]
"""Values `[T, D]` of the time-dependent parameters, in the order of the modules."""


class Permute(nn.Module):
    """Permute dimensions, as a module."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


def channels_first() -> Permute:
    return Permute(0, 3, 1, 2)


def channels_last() -> Permute:
    return Permute(0, 2, 3, 1)


class TDParameter(nn.Module):
    """Compute a time-dependent parameter `[T, D]` by five launches."""

    index: int

    def __init__(self, dim: int) -> None:
        super().__init__()
        for name in ("param0", "param1", "nodecay_weight", "nodecay_bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(dim)))

    def forward(self, tau: Tensor) -> Tensor:
        slope = self.nodecay_weight + 1
        gate = torch.sigmoid(torch.addcmul(self.nodecay_bias, slope, tau[:, None]))
        return torch.addcmul(self.param1, gate, self.param0 - self.param1)


class LayerNorm(nn.Module):
    """Layer norm with time-dependent scale and shift ("LN")."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = TDParameter(dim)
        self.bias = TDParameter(dim)

    def forward(self, x: Tensor, td: Values) -> Tensor:
        weight, bias = td[self.weight.index], td[self.bias.index]
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        if len(weight) == 1:
            rows = F.layer_norm(rows, rows.shape[-1:], weight[0], bias[0])
        else:
            rows = F.layer_norm(rows, rows.shape[-1:])
            rows = torch.addcmul(bias[:, None], weight[:, None], rows)
        return rows.reshape(x.shape)


def rms_normalised(x: Tensor) -> Tensor:
    """Return x divided by its root mean square over the last dimension."""
    rms = x.norm(2, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
    return x / (rms + 1e-8)


class RMSNorm(nn.Module):
    """RMS norm with a learned scale ("RMSN")."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, td: Values) -> Tensor:
        return self.scale * rms_normalised(x)


class TDRMSNorm(nn.Module):
    """RMS norm with a time-dependent scale ("TDRMSN")."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = TDParameter(dim)

    def forward(self, x: Tensor, td: Values) -> Tensor:
        scale = td[self.scale.index]
        if len(scale) == 1:
            return scale[0] * rms_normalised(x)
        return scale.view(len(scale), *[1] * (x.dim() - 2), -1) * rms_normalised(x)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "TDRMSN": TDRMSNorm,
    "RMSN": RMSNorm,
    "LN": LayerNorm,
}


class Attention(nn.Module):
    """Pre-norm self-attention on packed q, k and v, which are cast to fp32."""

    def __init__(self, config: BranchConfig, norm_type: str) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.norm = NORMS[norm_type](config.dim)
        self.query_key_value = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.dense = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, td: Values) -> Tensor:
        packed = self.query_key_value(self.norm(x, td)).unflatten(-1, (3 * self.heads, -1))
        q, k, v = packed.permute(0, 2, 1, 3).float().chunk(3, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.dense(mixed.permute(0, 2, 1, 3).reshape(x.shape))


class Depthwise(nn.Sequential):
    """Depthwise convolution, with permutations from and to channels-last."""

    def __init__(self, config: BranchConfig) -> None:
        k, d = config.kernel_size, config.dim
        conv = nn.Conv2d(d, d, k, padding=k // 2, groups=d)
        super().__init__(channels_first(), conv, channels_last())

    def forward(self, x: Tensor, td: Values) -> Tensor:
        return super().forward(x)


class GatedMLP(nn.Module):
    """Pre-norm `w2(gelu(w0(x)) * w1(x))`."""

    def __init__(self, config: BranchConfig, norm_type: str) -> None:
        super().__init__()
        self.norm = NORMS[norm_type](config.dim)
        self.w0 = nn.Linear(config.dim, config.hidden_dim)
        self.w1 = nn.Linear(config.dim, config.hidden_dim)
        self.w2 = nn.Linear(config.hidden_dim, config.dim)

    def forward(self, x: Tensor, td: Values) -> Tensor:
        x = self.norm(x, td)
        return self.w2(F.gelu(self.w0(x)) * self.w1(x))


class Block(nn.Module):
    """Attention or convolution, then MLP, each with a residual add."""

    def __init__(self, config: BranchConfig, norm_type: str, checkpointing: bool) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        transformer = config.block_type == "TransformerBlock"
        self.block1 = Attention(config, norm_type) if transformer else Depthwise(config)
        self.block2 = GatedMLP(config, norm_type)
        self.dropout = nn.Dropout(config.dropout_prob)

    def forward(self, x: Tensor, td: Values) -> Tensor:
        if self.checkpointing:
            return checkpoint.checkpoint(self.run, x, td, use_reentrant=False)
        return self.run(x, td)

    def run(self, x: Tensor, td: Values) -> Tensor:
        x = x + self.dropout(self.block1(x, td))
        return x + self.dropout(self.block2(x, td))


class PositionEmbedding(nn.Module):
    """Add a learned embedding of each position."""

    def __init__(self, config: BranchConfig) -> None:
        super().__init__()
        self.width = config.max_width
        self.position_embeddings = nn.Embedding(config.max_height * config.max_width, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        rows = torch.arange(height, device=x.device)[:, None].repeat(1, width)
        columns = torch.arange(width, device=x.device)[None].repeat(height, 1)
        return x + self.position_embeddings((rows * self.width + columns)[None])


class PixelShuffle(nn.Module):
    """Project features and rearrange them to an image `ratio` times as large."""

    def __init__(self, in_features: int, dim: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.kernel = nn.Linear(in_features, dim * ratio**2)

    def forward(self, x: Tensor) -> Tensor:
        boxes = self.kernel(x).unflatten(-1, (self.ratio, self.ratio, -1))
        return boxes.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class Branch(nn.Module):
    """One resolution: input layer, cascade, blocks with skips, output layer."""

    def __init__(self, model: DiMRConfig, index: int, checkpointing: bool) -> None:
        super().__init__()
        config = model.stage_configs[index]
        self.transformer = config.block_type == "TransformerBlock"
        self.depth = config.num_blocks // 2
        ratio, k = config.input_feature_ratio, config.final_kernel_size
        self.input_layer = nn.Sequential(
            nn.Identity(),
            nn.Conv2d(model.channels, config.dim, ratio, stride=ratio),
            channels_last(),
            PositionEmbedding(config),
        )
        if self.transformer:
            self.class_embeds = nn.Embedding(model.num_classes, config.dim)
        if index > 0:
            low = model.stage_configs[index - 1]
            in_features = low.dim * (2 * (low.num_blocks // 2) + 2)
            q = config.max_height // low.max_height
            self.upsample = nn.ModuleList(
                [
                    LayerNorm(in_features),
                    PixelShuffle(in_features, config.dim, q),
                    LayerNorm(config.dim),
                ]
            )
        self.blocks = nn.ModuleList(
            Block(config, model.norm_type, checkpointing) for _ in range(2 * self.depth + 1)
        )
        self.skip_denses = nn.ModuleList(
            nn.Linear(2 * config.dim, config.dim) for _ in range(self.depth)
        )
        self.output_layer = nn.ModuleList(
            [
                LayerNorm(config.dim),
                channels_first(),
                nn.Conv2d(config.dim, model.channels, k, padding=k // 2),
            ]
        )

    def forward(
        self, image: Tensor, below: Tensor | None, y: Tensor, td: Values
    ) -> tuple[Tensor, Tensor]:
        """Return the prediction, and features `[B, h, w, D·(2·depth + 2)]` for the next branch."""
        x = self.input_layer(image)
        if below is not None:
            norm_in, shuffle, norm_out = self.upsample
            x = x + norm_out(shuffle(norm_in(below, td)), td)
        size = x.shape[1:3]
        if self.transformer:
            x = torch.cat([self.class_embeds(y)[:, None], x.flatten(1, 2)], dim=1)
        features = [x]
        skips = []
        for j, block in enumerate(self.blocks):
            if j > self.depth:
                x = self.skip_denses[j - self.depth - 1](torch.cat([x, skips.pop()], dim=-1))
            x = block(x, td)
            features.append(x)
            if j < self.depth:
                skips.append(x)
        if self.transformer:
            x, *features = (f[:, 1:].unflatten(1, size) for f in (x, *features))
        norm, permute, conv = self.output_layer
        return conv(permute(norm(x, td))), torch.cat(features, dim=-1)


class PublishedDiMR(nn.Module):
    """Execute DiMR as the published code does, with the interface and parameter names of `DiMR`.

    The published code checkpoints every block; `checkpointing=False` keeps activations instead.
    """

    def __init__(self, config: DiMRConfig, checkpointing: bool = True) -> None:
        super().__init__()
        self.block_grad_to_lowres = config.block_grad_to_lowres
        self.stages = nn.ModuleList(
            Branch(config, i, checkpointing) for i in range(len(config.stage_configs))
        )
        self.td_parameters = [m for m in self.modules() if isinstance(m, TDParameter)]
        for index, parameter in enumerate(self.td_parameters):
            parameter.index = index

    @classmethod
    def of(cls, model: DiMR, checkpointing: bool = True) -> Self:
        """Return the published execution of `model`, which shares its parameters and gradients."""
        with torch.device("meta"):
            published = cls(model.config, checkpointing)
        published.load_state_dict(model.state_dict(keep_vars=True), strict=True, assign=True)
        return published

    def forward(
        self,
        x: Tensor,
        t: object = None,
        log_snr: Tensor | None = None,
        y: Tensor | None = None,
    ) -> list[Tensor]:
        assert log_snr is not None
        assert y is not None
        # The comparison waits for the device, which compiled graphs and meta tensors cannot do.
        can_wait = not (torch.compiler.is_compiling() or log_snr.is_meta)
        if can_wait and torch.all(log_snr == log_snr[0]):
            log_snr = log_snr[:1]
        tau = log_snr / 4
        td = [parameter(tau) for parameter in self.td_parameters]
        predictions = []
        below = None
        for branch in self.stages:
            prediction, below = branch(x, below, y, td)
            if self.block_grad_to_lowres:
                below = below.detach()
            predictions.append(prediction)
        return predictions


def guided(
    model: Callable[..., list[Tensor]],
    x: Tensor,
    log_snr: Tensor,
    y: Tensor,
    null_class: int,
    scale: float = 0.4,
) -> Tensor:
    """Return the guided noise prediction at the highest resolution, by two passes of B images."""
    conditional = model(x, log_snr=log_snr, y=y)[-1]
    null = model(x, log_snr=log_snr, y=torch.full_like(y, null_class))[-1]
    return conditional + scale * (conditional - null)
