"""Triton implementations of operators: when one can run, and how its kernels are registered."""

import functools
import importlib
import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (3, 6)


def why_not(x: torch.Tensor) -> str | None:
    """The reason why Triton kernels cannot run on `x`, or None where they can.

    They run on a GPU, on a CPU under Triton's interpreter, and on the meta device (shapes only).
    """
    if x.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"it takes {names}, x is {str(x.dtype).removeprefix('torch.')}"
    if x.device.type == "cpu" and not _interpreting():
        return "it runs on a GPU, x is on cpu (TRITON_INTERPRET=1 interprets the kernels there)"
    if x.device.type not in ("cuda", "cpu", "meta"):
        return f"it runs on a GPU, x is on {x.device.type}"
    reason = _why_not_installed()
    if reason is None and x.is_cuda:
        reason = why_not_gpu(x.device.index)
    elif reason is None and x.device.type == "cpu":
        reason = _why_not_interpreted()
    return reason


def slower(x: torch.Tensor) -> str | None:
    """The reason why "auto" passes over Triton kernels that could run on `x`."""
    return None if x.is_cuda else "off a GPU the kernels are only interpreted, for tests"


@torch.compiler.assume_constant_result
def _interpreting() -> bool:
    # As Triton itself reads the variable.
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@torch.compiler.assume_constant_result
def _why_not_installed() -> str | None:
    return _installed()


@functools.cache
def _installed() -> str | None:
    try:
        importlib.import_module("triton")
        version = metadata.version("triton")
    except ImportError as error:
        return f"triton does not import: {error}"
    if _numbers(version) < _OLDEST:
        return f"it needs Triton {'.'.join(map(str, _OLDEST))} or later, found {version}"
    return None


@torch.compiler.assume_constant_result
def _why_not_interpreted() -> str | None:
    return _interpreter()


@functools.cache
def _interpreter() -> str | None:
    triton, numpy = metadata.version("triton"), metadata.version("numpy")
    if _numbers(triton) < (3, 7) and _numbers(numpy) >= (2, 4):
        return f"the interpreter of Triton {triton} needs NumPy before 2.4, found {numpy}"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version, e.g. (3, 6) of "3.6.0"."""
    return tuple(map(int, version.split(".")[:2]))


@torch.compiler.assume_constant_result
def why_not_gpu(index: int | None) -> str | None:
    """The reason why GPU `index` (None: the current one) is too old, or None."""
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    return None


def register(
    operator: str, direction: str, schema: str, shapes: Callable[..., Any]
) -> Callable[..., Any]:
    """Register `launch_<direction>` of `dimr_fast.kernels.<operator>` as a torch operator.

    Its name is `dimr_fast::<operator>_<direction>.triton`: implementations are overloads of one
    operator. `shapes` allocates the outputs for given inputs; the first input is a tensor on the
    device to run on. The kernels' module is imported at the first launch.
    """
    name = f"dimr_fast::{operator}_{direction}.triton"
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(name, shapes)

    @torch.library.impl(name, ("cpu", "cuda"))
    def launch(*args: Any) -> Any:
        kernels = importlib.import_module(f"dimr_fast.kernels.{operator}")
        with torch.cuda.device_of(args[0]):
            return getattr(kernels, f"launch_{direction}")(*args)

    packet = getattr(torch.ops.dimr_fast, f"{operator}_{direction}")
    return packet.triton
