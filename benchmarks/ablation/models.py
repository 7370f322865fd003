"""Define the arms of the ablation: single-branch transformer to DiMR, one change at a time.

Branches, attention, convolutions, cascade and kernels are dimr_fast's own. Time token, adaLN-Zero
and plain MLP, which DiMR lacks, replace one of its modules. A branch passes `td` to its blocks; in
an arm without time-dependent parameters, `td` contains only the embedding of the time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimr_fast import BranchConfig, DiMR, DiMRConfig
from dimr_fast.layers import (
    Attention,
    Block,
    GatedMLP,
    Linear,
    Norm,
    TDLayerNorm,
    TDValues,
)
from dimr_fast.model import Branch, check_inputs

CHANNELS, SIDE = 3, 32
HEAD_DIM = 32
CONDITION = 128
"""Width of the time's embedding."""


class TimeEmbedding(nn.Sequential):
    """Embed the discrete step by sines, cosines and two linear layers: `[B]` to `[B, 128]`."""

    def __init__(self) -> None:
        super().__init__(Linear(CONDITION, CONDITION), nn.SiLU(), Linear(CONDITION, CONDITION))

    def forward(self, log_snr: Tensor) -> Tensor:
        step = (log_snr.float() + 4) * 125
        places = torch.arange(CONDITION // 2, device=log_snr.device) / (CONDITION // 2)
        angles = step[:, None] * torch.exp(-math.log(10_000) * places)
        return super().forward(torch.cat([angles.cos(), angles.sin()], 1))


class Modulation(nn.Module):
    """Compute vectors from the time's embedding; they are zero before training (adaLN-Zero)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = Linear(CONDITION, width)
        nn.init.zeros_(self.linear.weight)

    def forward(self, td: TDValues) -> Tensor:
        return self.linear(F.silu(td[0])).float()


class LayerNorm(Norm):
    """Layer norm with learned scale and shift, independent of time."""

    operator = "td_layer_norm"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def values(self, td: TDValues) -> tuple[Tensor, Tensor]:
        return self.weight[None], self.bias[None]


class AdaLayerNorm(Norm):
    """Layer norm whose scale and shift are linear in the activated embedding of the time."""

    operator = "td_layer_norm"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.modulation = Modulation(2 * dim)

    def values(self, td: TDValues) -> tuple[Tensor, Tensor]:
        scale, shift = self.modulation(td).chunk(2, -1)
        return 1 + scale, shift


class AdaLNZeroBlock(nn.Module):
    """Block with a gate on each increment; gates start at zero, so it starts as the identity."""

    def __init__(self, block: Block, dim: int) -> None:
        super().__init__()
        self.block1, self.block2 = block.block1, block.block2
        self.gates = Modulation(2 * dim)

    def forward(self, x: Tensor, td: TDValues) -> Tensor:
        first, second = self.gates(td)[:, None].to(x.dtype).chunk(2, -1)
        x = torch.addcmul(x, first, self.block1(x, td))
        x, increment = self.block2(x, td)
        return torch.addcmul(x, second, increment)


class PlainMLP(nn.Module):
    """Pre-norm `w2(gelu(w0(x)))` with the interface and the number of weights of `GatedMLP`."""

    def __init__(self, gated: GatedMLP) -> None:
        super().__init__()
        dim, hidden = gated.w0.in_features, gated.w0.out_features * 3 // 2
        self.norm = gated.norm
        self.w0, self.w2 = Linear(dim, hidden), Linear(hidden, dim)

    def forward(
        self, x: Tensor, td: TDValues, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            normed = self.norm(x, td)
        else:
            x, normed = self.norm(x, td, residual)
        return x, self.w2(F.gelu(self.w0(normed)))


class PatchHead(nn.Module):
    """Head of U-ViT: norm, linear layer to the pixels of each patch, convolution over the image."""

    def __init__(self, config: BranchConfig) -> None:
        super().__init__()
        self.size = (config.max_height, config.max_width)
        self.patch = config.input_feature_ratio
        self.norm = TDLayerNorm(config.dim)
        self.linear = Linear(config.dim, CHANNELS * self.patch**2)
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor, td: TDValues) -> Tensor:
        patches = self.linear(self.norm(x, td)).mT.unflatten(2, self.size)
        return self.conv(F.pixel_shuffle(patches, self.patch))


class TimeTokenBranch(Branch):
    """Branch without a cascade; the time's embedding is a token beside the class token."""

    def __init__(self, model: DiMRConfig, index: int) -> None:
        super().__init__(model, index)
        for module in self.modules():
            if isinstance(module, Attention):
                # "auto" chooses this in the other arms, but not for one token more.
                module.implementation = "bmm"

    def extra_tokens(self, y: Tensor, td: TDValues) -> Tensor:
        return torch.stack([self.class_embeds(y), td[0].expand(len(y), -1)], 1)


class TimeEmbedded(DiMR):
    """DiMR's branches with an embedding of the time instead of time-dependent norm parameters.

    `norm` builds the norms of blocks and heads from their width. The cascade's norms do not depend
    on time: modulating all its channels would take adaLN-Zero more weights than a block.
    """

    def __init__(
        self, config: DiMRConfig, norm: Callable[[int], nn.Module], branch: type[Branch] = Branch
    ) -> None:
        super().__init__(config)
        self.stages = nn.ModuleList(branch(config, i) for i in range(len(config.stage_configs)))
        if len(self.stages) == 1:
            self.stages[0].output_layer = PatchHead(config.stage_configs[0])
        self.time = TimeEmbedding()
        for name, module in list(self.named_modules()):
            if isinstance(module, TDLayerNorm):
                width = len(module.weight.param0)
                self.set_submodule(name, LayerNorm(width) if "upsample" in name else norm(width))
        self._td_parameters = ()

    def forward(
        self,
        x: Tensor,
        t: object = None,
        log_snr: Tensor | float | None = None,
        y: Tensor | None = None,
    ) -> list[Tensor]:
        """Predict the noise like `DiMR.forward`."""
        log_snr, y = check_inputs(self.config, x.device, x, log_snr, y)
        td = (self.time(log_snr),)
        predictions, features = [], []
        for branch in self.stages:
            prediction, features = branch(x, features, y, td)
            predictions.append(prediction)
        return predictions


@dataclass(frozen=True)
class Arm:
    """An arm: its model, its loss, and the FID that the paper states for 64×64 ImageNet."""

    title: str
    paper_fid: float
    build: Callable[[int], DiMR]
    """Builds a randomly initialised model from the number of classes, including the null class."""
    multi_scale: bool = False
    """Whether the predictions at all resolutions count in the loss, or only the full one."""


def _config(num_classes: int, *branches: tuple[int, int]) -> DiMRConfig:
    """Return a model with a transformer at 16×16 and, if given, ConvNeXt at 32×32.

    `branches`: width and number of blocks of each.
    """
    stages = []
    for i, (width, depth) in enumerate(branches):
        stages.append(
            BranchConfig(
                block_type="ConvNeXtBlock" if i else "TransformerBlock",
                dim=width,
                hidden_dim=2 * width,
                num_blocks=depth,
                max_height=SIDE if i else SIDE // 2,
                max_width=SIDE if i else SIDE // 2,
                input_feature_ratio=1 if i else 2,
                num_attention_heads=1 if i else width // HEAD_DIM,
            )
        )
    return DiMRConfig(
        channels=CHANNELS, num_classes=num_classes, stage_configs=tuple(stages), norm_type="LN"
    )


def _with_plain_mlps(model: DiMR) -> DiMR:
    for module in list(model.modules()):
        if isinstance(module, Block):
            module.block2 = PlainMLP(module.block2)
    return model


def _token_transformer(num_classes: int) -> DiMR:
    config = _config(num_classes, (128, 9))
    return _with_plain_mlps(TimeEmbedded(config, LayerNorm, TimeTokenBranch))


def _ada_ln_zero(branches: tuple[tuple[int, int], ...], num_classes: int) -> DiMR:
    model = _with_plain_mlps(TimeEmbedded(_config(num_classes, *branches), AdaLayerNorm))
    for branch, (width, _) in zip(model.stages, branches, strict=True):
        branch.blocks = nn.ModuleList(AdaLNZeroBlock(block, width) for block in branch.blocks)
    return model


def _dimr(num_classes: int) -> DiMR:
    return DiMR(_config(num_classes, (128, 7), (48, 3)))


ARMS = {
    "a": Arm("U-ViT-like, time token", 5.85, _token_transformer),
    "b": Arm("+ adaLN-Zero", 5.44, partial(_ada_ln_zero, ((96, 9),))),
    "c": Arm("adaLN-Zero + two branches", 7.91, partial(_ada_ln_zero, ((96, 7), (48, 3)))),
    "d": Arm("TD-LN + two branches", 5.21, lambda classes: _with_plain_mlps(_dimr(classes))),
    "e": Arm("+ gated MLP", 4.86, _dimr),
    "f": Arm("+ multi-scale loss (DiMR)", 3.65, _dimr, multi_scale=True),
}
