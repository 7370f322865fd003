"""The DiMR model: branches of increasing resolution, joined by a cascade (paper figure 2)."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from dimr_fast import ops
from dimr_fast.config import DiMRConfig, preset
from dimr_fast.hub.mixin import HubModel
from dimr_fast.layers import (
    Attention,
    Block,
    Embedding,
    Head,
    Linear,
    Operation,
    PatchEmbedding,
    TDParameter,
    TDValues,
    TDValuesOnUse,
    UpsampleAdd,
    is_subclass,
)
from dimr_fast.utils.validation import check_tensors


class Branch(nn.Module):
    """One resolution: embed the image, add the lower branch's features, run the blocks, predict."""

    def __init__(self, model: DiMRConfig, index: int) -> None:
        super().__init__()
        config = model.stage_configs[index]
        self.feeds_cascade = index + 1 < len(model.stage_configs)
        self.is_transformer = config.block_type == "TransformerBlock"
        self.checkpointing = config.checkpointing
        self.depth = config.num_blocks // 2
        self.input_layer = PatchEmbedding(config, model.channels)
        if self.is_transformer:
            self.class_embeds = Embedding(model.num_classes, config.dim)
        if index > 0:
            self.upsample = UpsampleAdd(model.stage_configs[index - 1], config)
        self.blocks = nn.ModuleList(
            Block(config, model.norm_type) for _ in range(2 * self.depth + 1)
        )
        self.skip_denses = nn.ModuleList(
            Linear(2 * config.dim, config.dim) for _ in range(self.depth)
        )
        self.output_layer = Head(config, model.channels)

    def forward(
        self, image: Tensor, features: list[Tensor], y: Tensor, td: TDValues
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the noise prediction `[B, C, h, w]` and features `[B, h·w, D]` for the cascade.

        `features` are those of the branch below. The last branch returns only its input embedding
        as features, since no cascade follows.
        """
        x = self.input_layer(image)
        if features:
            x = self.upsample(x, features, td)
        features = [x]
        extra = self.extra_tokens(y, td)
        count = 0
        if extra is not None:
            count = extra.shape[1]
            x = torch.cat([extra.to(x.dtype), x], 1)
        skips: list[Tensor] = []
        for j, block in enumerate(self.blocks):
            if j > self.depth:
                dense, both = self.skip_denses[j - self.depth - 1], (x, skips.pop())
                # Only our own layers take an input in pieces; adapters replace them.
                x = dense(*both) if type(dense) is Linear else dense(torch.cat(both, -1))
            x = self._run(block, x, td)
            if j < self.depth:
                skips.append(x)
            if self.feeds_cascade:
                features.append(_positions(x, count))
        return self.output_layer(_positions(x, count), td), features

    def extra_tokens(self, y: Tensor, td: TDValues) -> Tensor | None:
        """Return extra tokens `[B, E, D]` to prepend to the image tokens, or None.

        This class returns the class token in a transformer branch, None in a ConvNeXt branch. A
        subclass may return other tokens.
        """
        return self.class_embeds(y)[:, None] if self.is_transformer else None

    def _run(self, block: nn.Module, x: Tensor, td: TDValues) -> Tensor:
        if self.checkpointing == "selective" and torch.is_grad_enabled():
            return block(x, td, keep_products=True)
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint.checkpoint(block, x, td, use_reentrant=False)
        return block(x, td)


def _positions(x: Tensor, extra: int) -> Tensor:
    """Return the tokens of `x` without the first `extra`."""
    return x[:, extra:] if extra else x


class DiMR(Operation, HubModel):
    """Multi-resolution diffusion model that predicts the noise in an image (arXiv 2406.09416).

    `config` is a `DiMRConfig` or a published configuration object (any object with its attributes;
    it is not changed). Parameters have the names and shapes of the published state dict.
    `save_pretrained`, `from_pretrained` and `push_to_hub` come from `HubModel` and its mixin.
    Raises ValueError with the name of a configuration field that is out of range.
    """

    operator = "td_parameters"

    def __init__(self, config: DiMRConfig | Any) -> None:
        super().__init__()
        if not isinstance(config, DiMRConfig):
            config = DiMRConfig.from_published(config)
        self.config = config
        self.stages = nn.ModuleList(Branch(config, i) for i in range(len(config.stage_configs)))
        # Collected once: walking all modules takes longer than the operator that reads these.
        self._td_parameters = tuple(m for m in self.modules() if isinstance(m, TDParameter))
        for index, parameter in enumerate(self._td_parameters):
            parameter.index = index

    @property
    def channels(self) -> int:
        """Number of channels of the image, `config.channels`."""
        return self.config.channels

    @property
    def block_grad_to_lowres(self) -> bool:
        """Whether a branch's loss has no gradient in lower branches: that of `config`."""
        return self.config.block_grad_to_lowres

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """Return a randomly initialised model of a named size, e.g. `"DiMR-XL/2R"`.

        `overrides` replace fields of `DiMRConfig`, e.g. `num_classes=11`. Raises ValueError with
        the name of an unknown preset or field.
        """
        return cls(preset(name, **overrides))

    def set_implementation(self, implementation: str) -> Self:
        """Use the named implementation for every operator that has it, "auto" for the others.

        "reference" is plain PyTorch, slower, for what the others lack: transforms of `torch.func`,
        forward-mode AD, second derivatives, export.
        Raises ValueError if no operator has an implementation of that name.
        """
        known = {name for operator in ops.OPERATORS.values() for name in operator.names}
        if implementation not in known | {"auto"}:
            raise ValueError(
                f"implementation: got {implementation!r}, expected 'auto' or one of {sorted(known)}"
            )
        for module in self.modules():
            if isinstance(module, Linear):
                module.implementation = "reference" if implementation == "reference" else "auto"
            elif isinstance(module, Operation):
                has_it = implementation in ops.OPERATORS[module.operator].names
                module.implementation = implementation if has_it else "auto"
        return self

    def set_attention_backend(self, backend: str) -> Self:
        """Use the named implementation for attention; other operators keep theirs.

        The method and the names "native" and "flash" are those of diffusers; they select "sdpa" and
        "flash_attn". Raises ValueError if attention has no implementation of that name.
        """
        name = {"native": "sdpa", "flash": "flash_attn"}.get(backend, backend)
        known = ("auto", *ops.OPERATORS["attention"].names)
        if name not in known:
            raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(known)}")
        for module in self.modules():
            if isinstance(module, Attention):
                module.implementation = name
        return self

    def forward(
        self,
        x: Tensor,
        t: object = None,
        log_snr: Tensor | float | None = None,
        y: Tensor | None = None,
    ) -> list[Tensor]:
        """Predict the noise in `x` at the resolution of each branch, from low to high.

        Args:
            x: noisy image `[B, C, H, W]`, floating point.
            t: ignored; published training scripts pass it.
            log_snr: the time condition, `[B]` (a time per image), `[1]` or a number (one for all),
                floating point or integer. Despite its name it is not a log-SNR in the published
                recipe but `8·n/1000 − 4` for the discrete step n of 1..1000. It is computed with in
                float32, in a float64 model in float64.
            y: class of each image `[B]`, int64 or int32; `config.null_class` means no class.

        Returns a list of `[B, C, h, w]`, one per branch; the last has the size of `x`.
        Raises ValueError with the name of an argument that is missing or has a wrong shape, dtype
        or device, and, on a CPU, of a label out of range; TypeError if `x` or `y` is no tensor or
        `log_snr` neither a tensor nor a number.
        """
        weight = next(self.parameters())
        log_snr, y = check_inputs(self.config, weight.device, x, log_snr, y)
        # FSDP2 casts the parameters of a branch when it gathers them, and its inputs likewise.
        sharded = is_subclass(weight)
        if x.dtype != weight.dtype and not sharded and not ops.autocast_enabled(x.device.type):
            raise ValueError(f"x: got dtype {x.dtype}, expected {weight.dtype} as the parameters")
        td = self._td_values(log_snr.to(torch.promote_types(weight.dtype, torch.float32)) / 4)
        predictions = []
        features: list[Tensor] = []
        for branch in self.stages:
            prediction, features = branch(x, features, y, td)
            if self.config.block_grad_to_lowres:
                features = [f.detach() for f in features]
            predictions.append(prediction)
        return predictions

    def _td_values(self, tau: Tensor) -> TDValues:
        """Return the values of all time-dependent parameters at times `tau` `[T]`."""
        vectors = [parameter.vectors for parameter in self._td_parameters]
        if any(is_subclass(v) for four in vectors for v in four):
            return TDValuesOnUse(tau, self._td_parameters, self.implementation)
        return ops.td_parameters(tau, vectors, implementation=self.implementation)


def check_inputs(
    config: DiMRConfig,
    device: torch.device,
    x: Tensor,
    log_snr: Tensor | float | None,
    y: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Check the arguments of `DiMR.forward`; return `log_snr` as `[B]` or `[1]`, and `y`.

    Any floating-point dtype of `x` is accepted and any real dtype of `log_snr`, which is kept.
    Raises ValueError if an argument does not fit, TypeError if it is no tensor; `log_snr` may also
    be a number.
    """
    check_tensors(x=x)
    expected = (config.channels, *config.image_size)
    if x.dim() != 4 or tuple(x.shape[1:]) != expected:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, expected [B, {', '.join(map(str, expected))}]"
        )
    if not x.is_floating_point():
        raise ValueError(f"x: got dtype {x.dtype}, expected a floating-point dtype")
    if log_snr is None:
        raise ValueError("log_snr: got None, expected the time condition, [B] or [1]")
    if isinstance(log_snr, int | float):
        log_snr = torch.full((1,), log_snr, dtype=torch.float64, device=device)
    check_tensors(log_snr=log_snr)
    if log_snr.is_complex() or log_snr.dtype == torch.bool:
        raise ValueError(f"log_snr: got dtype {log_snr.dtype}, expected floating point or integer")
    if log_snr.dim() == 0:
        log_snr = log_snr[None]
    # One by one: Dynamo of torch 2.11 finds no symbolic size in a tuple.
    if log_snr.dim() != 1 or (log_snr.shape[0] != 1 and log_snr.shape[0] != x.shape[0]):
        raise ValueError(
            f"log_snr: got shape {tuple(log_snr.shape)}, expected [{x.shape[0]}] or [1]"
        )
    if y is None:
        raise ValueError("y: got None, expected the class of each image, [B]")
    check_tensors(y=y)
    if y.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"y: got dtype {y.dtype}, expected int64 or int32")
    if tuple(y.shape) != (x.shape[0],):
        raise ValueError(f"y: got shape {tuple(y.shape)}, expected [{x.shape[0]}]")
    for name, value in (("x", x), ("log_snr", log_snr), ("y", y)):
        if value.device != device:
            raise ValueError(
                f"{name}: got device {value.device}, expected {device} as the parameters"
            )
    return log_snr, y
