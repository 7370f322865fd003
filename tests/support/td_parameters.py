"""Calls of `td_parameters` on vectors that differ."""

from collections.abc import Callable
from typing import Any

import torch

from dimr_fast import ops
from tests.support.oracle import DEVICE, seeded


def by(implementation: str, tau: torch.Tensor) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return the values at times `tau` as a function of the vectors, four per parameter."""

    def values(*vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parameters: Any = list(zip(*(vectors[i::4] for i in range(4)), strict=True))
        times = tau.double() if vectors[0].dtype == torch.float64 else tau
        return ops.td_parameters(times, parameters, implementation=implementation)

    return values


def vectors_of(*widths: int) -> list[torch.Tensor]:
    """Return four different vectors for each parameter."""
    return [v for i, width in enumerate(widths, 1) for v in seeded(4, i, width)[:, -1].clone()]


def times(count: int) -> torch.Tensor:
    return torch.linspace(-1, 1, count, device=DEVICE)
