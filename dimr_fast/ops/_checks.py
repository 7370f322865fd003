"""Checks of arguments that several operators share."""

import torch
from torch import Tensor

from dimr_fast.utils.compilation import constant_result

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of features that compiled and Triton kernels take; the reference takes any."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to compute in: autocast's where autocast is on, otherwise that of `x`.

    A norm returns its result in this dtype too: the linear layer after it would cast it anyway.
    Autocast does not change float64.
    """
    device = x.device.type
    on = autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if on else x.dtype


def autocast_enabled(device: str) -> bool:
    """Return True if autocast is on for this device type; some types ("meta") have no autocast."""
    return _has_autocast(device) and torch.is_autocast_enabled(device)


# Dynamo of torch 2.11 cannot trace this call; its result is constant.
@constant_result
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without "torch.", e.g. "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def why_not_dtype(x: Tensor) -> str | None:
    """Return why kernels cannot run on the dtype of `x`, or None if they can."""
    if x.dtype in KERNEL_DTYPES:
        return None
    names = ", ".join(map(dtype_name, KERNEL_DTYPES))
    return f"it takes {names}, x is {dtype_name(x.dtype)}"


def check_floating(**tensors: Tensor) -> None:
    """Raise ValueError if a tensor is not floating point."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: got dtype {tensor.dtype}, expected floating point")


def check_residual(x: Tensor, residual: Tensor | None) -> None:
    """Raise ValueError if `residual` is not None and differs from `x` in shape or device."""
    if residual is None:
        return
    check_floating(residual=residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual: got shape {tuple(residual.shape)}, expected that of x, {tuple(x.shape)}"
        )
    check_device(x, residual, "residual")


def check_time_values(x: Tensor, **values: Tensor) -> None:
    """Raise ValueError if a `[T, D]` value does not fit `x` `[B, …, D]` (T is B or 1)."""
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, …, D]")
    check_floating(x=x, **values)
    for name, value in values.items():
        check_times(x, value, name)
        check_width(x, value, name)


def check_times(x: Tensor, value: Tensor, name: str, width: int | None = None) -> None:
    """Raise ValueError if `value` is not `[T, width]`, where T is 1 or the batch size of `x`."""
    batch = x.shape[0]
    wrong_width = width is not None and value.shape[-1:] != (width,)
    # One by one: Dynamo of torch 2.11 finds no symbolic size in a tuple.
    wrong_times = value.dim() != 2 or (value.shape[0] != 1 and value.shape[0] != batch)
    if wrong_times or wrong_width:
        expected = f"[1 or {batch}, {x.shape[-1] if width is None else width}]"
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {expected}")


def check_width(x: Tensor, value: Tensor, name: str) -> None:
    """Raise ValueError if `value` differs from `x` in device or in the size of the last axis."""
    if x.dim() < 1:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, …, D]")
    if value.shape[-1:] != x.shape[-1:]:
        width = value.shape[-1]
        raise ValueError(f"{name}: got width {width}, expected that of x, {x.shape[-1]}")
    check_device(x, value, name)


def check_device(x: Tensor, value: Tensor, name: str) -> None:
    """Raise ValueError if `value` is not on the device of `x`."""
    if value.device != x.device:
        raise ValueError(f"{name}: got device {value.device}, expected that of x, {x.device}")
