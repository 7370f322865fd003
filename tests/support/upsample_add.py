"""Calls of `upsample_add`, with its features in several layouts."""

from collections.abc import Callable
from typing import Any

import torch

from dimr_fast import ops
from tests.support.oracle import Function, seeded

Inputs = tuple[torch.Tensor, ...]


def inputs(
    images: int = 2,
    size: tuple[int, int] = (2, 3),
    slots: int = 3,
    width: int = 8,
    out: int = 24,
    q: int = 2,
    times: int | None = None,
) -> Inputs:
    """Return x, a buffer of features, and the parameters of norm_in, projection and norm_out."""
    times = images if times is None else times
    h, w = size
    channels = slots * width
    return (
        seeded(images, h * q, w * q, out),
        3 * seeded(images, h, w, slots, width) + 1,
        seeded(times, channels),
        seeded(times, channels).flip(1),
        seeded(out * q * q, channels) / channels**0.5,
        seeded(out * q * q),
        seeded(times, out),
        seeded(times, out).flip(1),
    )


def by(implementation: str, features: Callable[[torch.Tensor], Any] = lambda f: f) -> Function:
    """Return `upsample_add` as a function of tensors; `features` converts the features' buffer."""

    def run(x: torch.Tensor, buffer: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        scale_in, shift_in, weight, bias, scale_out, shift_out = values
        return ops.upsample_add(
            x,
            features(buffer),
            (scale_in, shift_in),
            weight,
            bias,
            (scale_out, shift_out),
            implementation=implementation,
        )

    return run


def as_list(buffer: torch.Tensor) -> list[torch.Tensor]:
    return list(buffer.unbind(-2))


def as_tokens(buffer: torch.Tensor) -> list[torch.Tensor]:
    """Return features like those of a transformer branch: views without the class token."""
    first, *others = buffer.unbind(-2)

    def without_class_token(f: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat([torch.zeros_like(f[:, 0, :1]), f.flatten(1, 2)], 1)
        return tokens[:, 1:].unflatten(1, f.shape[1:3])

    return [first.contiguous(), *map(without_class_token, others)]


def strided(buffer: torch.Tensor) -> torch.Tensor:
    """Return the buffer with slots that are not adjacent in memory."""
    return buffer.movedim(-2, 0).contiguous().movedim(0, -2)


FEATURES: dict[str, Callable[[torch.Tensor], Any]] = {
    "buffer": lambda buffer: buffer,
    "list": as_list,
    "tokens": as_tokens,
    "strided buffer": strided,
}
