"""A small autoencoder of diffusers."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch


def save_autoencoder(folder: Path, *, blocks: int = 4, **settings: Any) -> Path:
    """Write a randomly initialised AutoencoderKL and return its folder.

    It has 0.1M weights at most and 4 channels; latents have 2^(blocks − 1) times fewer rows and
    columns than images.
    """
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: hub)")
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "block_out_channels": (8, 16, 16, 16)[:blocks],
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    diffusers.AutoencoderKL(**(values | settings)).save_pretrained(folder)
    return folder


def original_names(state: dict[str, torch.Tensor], blocks: int = 4) -> dict[str, torch.Tensor]:
    """Return the weights of an AutoencoderKL as the latent diffusion code names and shapes them."""
    renamed = {}
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    for name, value in state.items():
        new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        for pattern, part in (("resnets", "block"), (r"upsamplers\.0", "upsample")):
            # The original counts from the highest resolution.
            new = re.sub(
                rf"up_blocks\.(\d)\.{pattern}",
                lambda match, part=part: f"up.{blocks - 1 - int(match[1])}.{part}",
                new,
            )
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1")
            for theirs, original in attention.items():
                new = new.replace(f".{theirs}.", f".{original}.")
            if value.dim() == 2:  # a 1×1 convolution
                value = value[:, :, None, None]
        renamed[new] = value
    return renamed
