"""The autoencoder between pixels and latents: diffusers' AutoencoderKL."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dimr_fast.data.scaling import LatentScale, Scale
from dimr_fast.errors import CheckpointError, DataUnavailableError
from dimr_fast.utils.tensors import sha256_of_named, unpickle_tensors

Decode = Callable[[Tensor], Tensor]
"""A function from latents [B, C, h, w] to images uint8 [B, 3, H, W] on the CPU."""


class Autoencoder:
    """Convert images to moments and latents to images with a pretrained, frozen AutoencoderKL.

    Latents have `channels` channels, `downsampling` times fewer rows and columns than images, and
    about unit variance after `scale`. If the autoencoder has a shift, it is subtracted here.
    """

    def __init__(self, network: Any) -> None:
        self._network = network.eval().requires_grad_(False)
        config = network.config
        self.channels: int = config.latent_channels
        self.downsampling: int = 2 ** (len(config.block_out_channels) - 1)
        self.scale = LatentScale(config.scaling_factor)
        self._shift: float = config.shift_factor or 0.0

    @classmethod
    def load(
        cls, path_or_name: str, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Self:
        """Load an autoencoder from a folder that diffusers wrote, or by its name on the Hub.

        It may also be a file of the weights of Stable Diffusion's autoencoder in their original
        form, such as `autoencoder_kl_ema.pth` of the published code. It computes in `dtype`,
        float32 or bfloat16. Raises DataUnavailableError where diffusers is
        missing, ValueError where there is no complete autoencoder of that name.
        """
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise DataUnavailableError("the diffusers package", extra="hub") from error
        path_or_name = os.path.expanduser(path_or_name)
        wanted = f"autoencoder: got {path_or_name!r}, expected a folder or name of an AutoencoderKL"
        if os.path.isfile(path_or_name):
            try:
                network = _from_original_weights(Path(path_or_name))
            except (CheckpointError, RuntimeError, ValueError) as error:
                raise ValueError(f"{wanted} ({error})") from error
            return cls(network.to(device, dtype))
        try:
            kind = AutoencoderKL.load_config(path_or_name).get("_class_name")
            if kind != "AutoencoderKL":
                raise ValueError(f"it is of class {kind}")
            network, loading = AutoencoderKL.from_pretrained(
                path_or_name,
                torch_dtype=dtype,
                low_cpu_mem_usage=False,  # True needs accelerate
                output_loading_info=True,
            )
        except Exception as error:  # from diffusers, huggingface_hub, safetensors or json
            raise ValueError(f"{wanted} ({error})") from error
        incomplete = [*loading["missing_keys"], *loading["mismatched_keys"]]
        if incomplete:
            raise ValueError(f"{wanted} with all its weights ({incomplete[0]} is missing)")
        return cls(network.to(device))

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Encode uint8 [B, 3, H, W] to means and log variances, fp32 [B, 2C, h, w].

        The result is on the autoencoder's device. H and W are multiples of `downsampling`.
        """
        x = images.to(self._network.device).float() / 127.5 - 1
        moments = self._network.encode(x.to(self._network.dtype)).latent_dist.parameters.float()
        moments[:, : self.channels] -= self._shift
        return moments

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode unscaled latents [B, C, h, w] to uint8 [B, 3, H, W] on the CPU.

        Raises FloatingPointError where the images are not finite.
        """
        z = (latents + self._shift).to(self._network.device, self._network.dtype)
        x = self._network.decode(z).sample.float()
        if not x.isfinite().all():
            raise FloatingPointError(f"autoencoder: its images are not finite in {z.dtype}")
        return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).cpu()

    def fingerprint(self) -> str:
        """Return the SHA-256 of the weights, in the dtype it computes in."""
        return sha256_of_named(self._network.state_dict())


def _from_original_weights(path: Path) -> Any:
    """Return the AutoencoderKL of weights with the names of the latent diffusion code.

    Sizes are those of the weights; the rest of the architecture is Stable Diffusion's.
    """
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    weights = unpickle_tensors(path)
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise CheckpointError(f"{path}: holds other data, expected a state dict")
    first = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(len(weights))]
    widths = [len(weights[name]) for name in first if name in weights]
    latents = weights.get("post_quant_conv.weight")
    if not widths or latents is None:
        raise CheckpointError(f"{path}: its weights are not those of an autoencoder")
    block = re.compile(r"encoder\.down\.0\.block\.\d+\.conv1\.weight")
    blocks = [name for name in weights if block.fullmatch(str(name))]
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": tuple(widths),
        "layers_per_block": len(blocks),
        "latent_channels": latents.shape[1],
    }
    network: Any = AutoencoderKL(**config)
    converted = convert_ldm_vae_checkpoint(weights, config)
    missing, unknown = network.load_state_dict(converted, strict=False)
    if missing or unknown or len(converted) != len(weights):
        which = f"{missing[0]} is missing" if missing else "it has others"
        raise CheckpointError(f"{path}: not the weights of Stable Diffusion's autoencoder, {which}")
    return network


def load_decoder(
    path_or_name: str | None, scale: Scale, shape: tuple[int, int, int], device: torch.device
) -> tuple[Decode | None, tuple[int, int]]:
    """Load the decoder of a model's outputs; return it and the image size (height, width).

    Arguments and errors are those of `load_autoencoder`. Pixel models have no decoder (None).
    """
    autoencoder, size = load_autoencoder(path_or_name, scale, shape, device)
    return None if autoencoder is None else autoencoder.decode, size


def load_autoencoder(
    path_or_name: str | None, scale: Scale, shape: tuple[int, int, int], device: torch.device
) -> tuple[Autoencoder | None, tuple[int, int]]:
    """Load the autoencoder that decodes a model's outputs; return it and the images' (height,
    width).

    `scale` and `shape` (C, H, W) are the model's. Pixel models have no autoencoder (None). Raises
    ValueError if a latent model has no autoencoder or one with a different scale or number of
    channels, and if a pixel model has one. Also raises the errors of `Autoencoder.load`.
    """
    channels, height, width = shape
    latents = isinstance(scale, LatentScale)
    if latents == (path_or_name is None):
        expected = "an AutoencoderKL that decodes latents" if latents else "None for pixels"
        raise ValueError(f"autoencoder: got {path_or_name!r}, expected {expected}")
    if path_or_name is None:
        return None, (height, width)
    autoencoder = Autoencoder.load(path_or_name, device)
    if (autoencoder.channels, autoencoder.scale) != (channels, scale):
        raise ValueError(
            f"autoencoder: got {path_or_name!r} of {autoencoder.channels} channels and "
            f"{autoencoder.scale}, expected the model's {channels} channels and {scale}"
        )
    factor = autoencoder.downsampling
    return autoencoder, (factor * height, factor * width)
