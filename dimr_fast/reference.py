"""The specification: every operator and the whole model in plain PyTorch.

The tests compare all implementations with this file. It shares no code with them and is written to
be read beside the paper (arXiv 2406.09416), not to be fast. Features are channels-last; `B` is the
batch size, `N` the number of tokens, `D` the width, and `T` is `B` (a time per image) or 1 (one
time for all).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _widen(x: Tensor) -> Tensor:
    """Cast half precision to float32: statistics are never computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_image(value: Tensor, x: Tensor) -> Tensor:
    """Return a view of a `[T, D]` value that broadcasts over `[B, …, D]`."""
    return value.reshape(value.shape[0], *[1] * (x.dim() - 2), value.shape[-1])


def td_parameter(
    tau: Tensor, param0: Tensor, param1: Tensor, nodecay_weight: Tensor, nodecay_bias: Tensor
) -> Tensor:
    """Return the value `[T, D]` of a time-dependent parameter at times `tau` `[T]` (eq. 4–5)."""
    gate = torch.sigmoid((nodecay_weight + 1) * tau[:, None] + nodecay_bias)
    return param1 + gate * (param0 - param1)


def td_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute the layer norm of `x` `[B, …, D]` with scale and shift per time, each `[T, D]`."""
    wide = _widen(x)
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    return (normed * _per_image(weight, x) + _per_image(bias, x)).to(x.dtype)


def td_rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Compute the RMS norm of `x` `[B, …, D]` with a scale per time `[T, D]`.

    Epsilon is added to the root mean square, not to the mean square.
    """
    wide = _widen(x)
    # Unlike the square root of a mean, vector_norm has a finite gradient on a row of zeros.
    rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
    return (wide / (rms + 1e-8) * _per_image(scale, x)).to(x.dtype)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Compute the RMS norm of `x` `[B, …, D]` with one learned scale `[D]`."""
    return td_rms_norm(x, scale[None])


def gated_gelu(x: Tensor) -> Tensor:
    """Compute `gelu(a) · b` with the exact (erf) GELU, for `x` `[…, 2·hidden]` = `[a, b]`."""
    gate, value = x.chunk(2, -1)
    return F.gelu(gate) * value


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round the rows of `x` `[…, D]` to e4m3 values `[…, D]`, with fp32 scales `[…, 1]`.

    A row is about `values · scale`. Its largest magnitude becomes 448, the largest e4m3 value.
    """
    wide = _widen(x)
    scale = (wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448).float()
    return (wide / scale).to(torch.float8_e4m3fn), scale


def td_rms_norm_fp8(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `td_rms_norm`, not rounded to the dtype of `x`, and quantise its rows."""
    return quantize_fp8(td_rms_norm(_widen(x), scale))


def td_layer_norm_fp8(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `td_layer_norm`, not rounded to the dtype of `x`, and quantise its rows."""
    return quantize_fp8(td_layer_norm(_widen(x), weight, bias))


def gated_gelu_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `gated_gelu`, not rounded to the dtype of `x`, and quantise its rows."""
    return quantize_fp8(gated_gelu(_widen(x)))


def linear_fp8(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Compute a linear layer in float32 from rows of `quantize_fp8`, which also scales `weight`."""
    return F.linear(x.float() * x_scale, weight.float() * weight_scale, bias)


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Compute softmax attention, packed `[B, N, 3·heads·head_dim]` to `[B, N, heads·head_dim]`."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = _widen(q @ k.mT) / math.sqrt(q.shape[-1])
    out = scores.softmax(-1).to(v.dtype) @ v
    return out.transpose(1, 2).flatten(2)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve each channel of `x` `[B, H, W, D]` with its odd k×k filter `[D, 1, k, k]`."""
    padding = weight.shape[-1] // 2
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=weight.shape[0])
    return out.permute(0, 2, 3, 1)


def upsample_add(
    x: Tensor,
    features: Sequence[Tensor],
    norm_in: tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor,
    norm_out: tuple[Tensor, Tensor],
) -> Tensor:
    """Add a branch's features to the embedding `x` `[B, H, W, D]` of the next (paper section 3.1).

    `features` are `[B, h, w, d]` each. `norm_in` and `norm_out` are the scale and shift per time of
    the two norms. `weight` `[D·q², d·len(features)]` is the projection, whose output channels are
    ordered `[row, column, D]` within a box of q×q, where q = H/h.
    """
    h, w = features[0].shape[1:3]
    q = x.shape[1] // h
    y = td_layer_norm(torch.cat(list(features), -1), *norm_in)
    y = F.linear(y, weight, bias)
    y = y.unflatten(-1, (q, q, -1)).permute(0, 1, 3, 2, 4, 5).reshape(-1, h * q, w * q, x.shape[-1])
    return x + td_layer_norm(y, *norm_out)


class _Parameters:
    """The parameters of a state dict under one prefix, with time-dependent ones at `tau`."""

    def __init__(self, state: Mapping[str, Tensor], tau: Tensor, prefix: str = "") -> None:
        self.state, self.tau, self.prefix = state, tau, prefix

    def at(self, name: str) -> "_Parameters":
        return _Parameters(self.state, self.tau, f"{self.prefix}{name}.")

    def __getitem__(self, name: str) -> Tensor:
        return self.state[self.prefix + name]

    def td(self, name: str) -> Tensor:
        vectors = ("param0", "param1", "nodecay_weight", "nodecay_bias")
        return td_parameter(self.tau, *(self[f"{name}.{v}"] for v in vectors))

    def td_norm(self, name: str) -> tuple[Tensor, Tensor]:
        return self.td(f"{name}.weight"), self.td(f"{name}.bias")

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self[f"{name}.weight"], self.state.get(f"{self.prefix}{name}.bias"))


def _norm(x: Tensor, p: _Parameters, norm_type: str) -> Tensor:
    if norm_type == "LN":
        return td_layer_norm(x, *p.td_norm("norm"))
    return (
        td_rms_norm(x, p.td("norm.scale"))
        if norm_type == "TDRMSN"
        else rms_norm(x, p["norm.scale"])
    )


def _block(x: Tensor, p: _Parameters, config: Any, branch: Any) -> Tensor:
    mixer, mlp = p.at("block1"), p.at("block2")
    if branch.block_type == "TransformerBlock":
        qkv = mixer.linear(_norm(x, mixer, config.norm_type), "query_key_value")
        x = x + mixer.linear(attention(qkv, branch.num_attention_heads), "dense")
    else:
        image = x.unflatten(1, (branch.max_height, branch.max_width))
        x = x + depthwise_conv2d(image, mixer["1.weight"], mixer["1.bias"]).flatten(1, 2)
    y = _norm(x, mlp, config.norm_type)
    hidden = torch.cat([mlp.linear(y, "w0"), mlp.linear(y, "w1")], -1)
    return x + mlp.linear(gated_gelu(hidden), "w2")


def dimr(
    config: Any, state: Mapping[str, Tensor], image: Tensor, log_snr: Tensor, y: Tensor
) -> list[Tensor]:
    """Run the whole model without dropout.

    Returns one noise prediction `[B, C, h, w]` per branch, from low to high resolution. `config`
    has the fields of `DiMRConfig`, `state` the names of the published state dict; `image` is
    `[B, C, H, W]`, `log_snr` `[B]` or `[1]`, `y` `[B]`.
    """
    params = _Parameters(state, log_snr / 4)
    predictions: list[Tensor] = []
    features: list[Tensor] = []
    for i, branch in enumerate(config.stage_configs):
        p = params.at(f"stages.{i}")
        size = (branch.max_height, branch.max_width)
        x = F.conv2d(
            image,
            p["input_layer.1.weight"],
            p["input_layer.1.bias"],
            stride=branch.input_feature_ratio,
        )
        x = x.flatten(2).mT + p["input_layer.3.position_embeddings.weight"]
        if features:
            low = config.stage_configs[i - 1]
            maps = [f.unflatten(1, (low.max_height, low.max_width)) for f in features]
            if config.block_grad_to_lowres:
                maps = [f.detach() for f in maps]
            x = upsample_add(
                x.unflatten(1, size),
                maps,
                p.td_norm("upsample.0"),
                p["upsample.1.kernel.weight"],
                p["upsample.1.kernel.bias"],
                p.td_norm("upsample.2"),
            ).flatten(1, 2)

        features = [x]
        is_transformer = branch.block_type == "TransformerBlock"
        if is_transformer:
            x = torch.cat([p["class_embeds.weight"][y][:, None], x], 1)
        depth = branch.num_blocks // 2
        skips: list[Tensor] = []
        for j in range(2 * depth + 1):
            if j > depth:
                x = p.linear(torch.cat([x, skips.pop()], -1), f"skip_denses.{j - depth - 1}")
            x = _block(x, p.at(f"blocks.{j}"), config, branch)
            if j < depth:
                skips.append(x)
            features.append(x[:, 1:] if is_transformer else x)

        x = td_layer_norm(features[-1], *p.td_norm("output_layer.0")).mT.unflatten(2, size)
        head = p["output_layer.2.weight"]
        predictions.append(F.conv2d(x, head, p["output_layer.2.bias"], padding=head.shape[-1] // 2))
    return predictions
