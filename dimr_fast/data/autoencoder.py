"""The autoencoder between pixels and latents: diffusers' AutoencoderKL."""

import os
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from dimr_fast.data.scaling import LatentScale, Scale
from dimr_fast.errors import DataUnavailableError
from dimr_fast.utils.tensors import sha256_of_named

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

        It computes in `dtype`, float32 or bfloat16. Raises DataUnavailableError where diffusers is
        missing, ValueError where there is no complete autoencoder of that name.
        """
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise DataUnavailableError("the diffusers package", extra="hub") from error
        path_or_name = os.path.expanduser(path_or_name)
        wanted = f"autoencoder: got {path_or_name!r}, expected a folder or name of an AutoencoderKL"
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


def load_decoder(
    path_or_name: str | None, scale: Scale, shape: tuple[int, int, int], device: torch.device
) -> tuple[Decode | None, tuple[int, int]]:
    """Load the decoder of a model's outputs; return it and the image size (height, width).

    `scale` and `shape` (C, H, W) are the model's. Pixel models have no decoder (None). Raises
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
    return autoencoder.decode, (factor * height, factor * width)
