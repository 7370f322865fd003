"""The implementation "triton": when its kernels can run, and how they are launched."""

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch

from dimr_fast.ops import packages
from dimr_fast.ops._checks import why_not_dtype
from dimr_fast.ops.registration import Implementation
from dimr_fast.utils.compilation import constant_result

_OLDEST = (3, 6)


def why_not(x: torch.Tensor) -> str | None:
    """Return why Triton kernels cannot run on `x`, or None if they can.

    They run on a GPU, on a CPU under Triton's interpreter, and on the meta device (shapes only).
    """
    if (reason := why_not_dtype(x)) is not None:
        return reason
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
    """Return why "auto" skips Triton kernels that can run on `x`, or None if it does not."""
    return None if x.is_cuda else "off a GPU the kernels are only interpreted, for tests"


@constant_result
def _interpreting() -> bool:
    # The values that Triton itself accepts.
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@constant_result
def _why_not_installed() -> str | None:
    return packages.why_not("triton", "triton", _OLDEST)


@constant_result
def _why_not_interpreted() -> str | None:
    (triton, triton_numbers), (numpy, numpy_numbers) = map(packages.version, ("triton", "numpy"))
    if triton_numbers < (3, 7) and numpy_numbers >= (2, 4):
        return f"the interpreter of Triton {triton} needs NumPy before 2.4, found {numpy}"
    return None


@constant_result
def why_not_gpu(index: int | None) -> str | None:
    """Return why GPU `index` is too old, or None if it is not. `index` None: the current GPU."""
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    return None


def _load(operator: str, direction: str) -> Callable[..., Any]:
    """Return a function that calls `launch_<direction>` of `dimr_fast.kernels.<operator>`.

    Its first argument is a tensor on the device to run on. The kernels' module is imported at the
    first call, so that importing `dimr_fast` does not need Triton.
    """

    def launch(*args: Any) -> Any:
        kernels = importlib.import_module(f"dimr_fast.kernels.{operator}")
        with torch.cuda.device_of(args[0]):
            return getattr(kernels, f"launch_{direction}")(*args)

    return launch


TRITON = Implementation("triton", why_not, slower, overload="triton", load=_load)
