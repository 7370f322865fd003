"""The implementations "cpu" and "cuda": kernels of the compiled libraries.

Both register their kernels for the default overload of an operator's schemas, each for its device.
"""

import torch

from dimr_fast import _extension
from dimr_fast.ops._checks import why_not_dtype
from dimr_fast.ops.registration import Implementation


def why_not_cpu(x: torch.Tensor) -> str | None:
    """Return why the CPU library cannot run on `x`, or None if it can."""
    return _why_not(x, "cpu")


def why_not_cuda(x: torch.Tensor) -> str | None:
    """Return why the CUDA library cannot run on `x`, or None if it can.

    It runs on a GPU and on the meta device (shapes only).
    """
    if x.device.type == "meta":
        return why_not_dtype(x)
    return _why_not(x, "cuda") or _extension.why_not_gpu(x.device.index)


def _why_not(x: torch.Tensor, library: str) -> str | None:
    if x.device.type != library:
        return f"it runs on {library}, x is on {x.device.type}"
    return why_not_dtype(x) or _extension.why_not(library)


CPU = Implementation("cpu", why_not_cpu, overload="default")
CUDA = Implementation("cuda", why_not_cuda, overload="default")
