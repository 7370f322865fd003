"""Argument checks that several operators share."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which to compute: that of `x` or, where autocast is on, autocast's.

    A norm's result too, since a product follows that autocast would cast for; float64 it leaves
    alone.
    """
    device = x.device.type
    on = autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if on else x.dtype


def autocast_enabled(device: str) -> bool:
    """Return True if autocast is on for this type of device; some types ("meta") have none."""
    return _has_autocast(device) and torch.is_autocast_enabled(device)


# The Dynamo of torch 2.11 cannot trace the call, and its result never changes.
@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def check_floating(**tensors: Tensor) -> None:
    """ValueError where a tensor is not floating point."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: got dtype {tensor.dtype}, expected floating point")


def check_residual(x: Tensor, residual: Tensor | None) -> None:
    """ValueError where `residual` is there and not like `x`."""
    if residual is None:
        return
    check_floating(residual=residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual: got shape {tuple(residual.shape)}, expected that of x, {tuple(x.shape)}"
        )
    check_device(x, residual, "residual")


def check_time_values(x: Tensor, **values: Tensor) -> None:
    """ValueError where a `[T, D]` value does not fit `x` `[B, …, D]` (T is B or 1)."""
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, …, D]")
    check_floating(x=x, **values)
    for name, value in values.items():
        check_times(x, value, name)
        check_width(x, value, name)


def check_times(x: Tensor, value: Tensor, name: str, width: int | None = None) -> None:
    """ValueError where `value` is not `[T, width]`, T being the batch of `x` or 1."""
    batch = x.shape[0]
    wrong_width = width is not None and value.shape[-1:] != (width,)
    if value.dim() != 2 or value.shape[0] not in (1, batch) or wrong_width:
        expected = f"[1 or {batch}, {x.shape[-1] if width is None else width}]"
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {expected}")


def check_width(x: Tensor, value: Tensor, name: str) -> None:
    """ValueError where `value`'s last axis is not as wide as `x`'s or lies on another device."""
    if x.dim() < 1:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, …, D]")
    if value.shape[-1:] != x.shape[-1:]:
        width = value.shape[-1]
        raise ValueError(f"{name}: got width {width}, expected that of x, {x.shape[-1]}")
    check_device(x, value, name)


def check_device(x: Tensor, value: Tensor, name: str) -> None:
    """ValueError where `value` does not lie on the device of `x`."""
    if value.device != x.device:
        raise ValueError(f"{name}: got device {value.device}, expected that of x, {x.device}")
