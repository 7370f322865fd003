"""Compiled implementations of operators: when one can run, and how their schemas are declared."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from dimr_fast import _extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_cpu(x: torch.Tensor) -> str | None:
    """The reason why the CPU library cannot run on `x`, or None where it can."""
    return _why_not(x, "cpu")


def why_not_cuda(x: torch.Tensor) -> str | None:
    """The reason why the CUDA library cannot run on `x`, or None where it can.

    It runs on a GPU and on the meta device (shapes only).
    """
    if x.device.type == "meta":
        return _why_not_dtype(x)
    return _why_not(x, "cuda") or _extension.why_not_gpu(x.device.index)


def _why_not(x: torch.Tensor, library: str) -> str | None:
    if x.device.type != library:
        return f"it runs on {library}, x is on {x.device.type}"
    return _why_not_dtype(x) or _extension.why_not(library)


def _why_not_dtype(x: torch.Tensor) -> str | None:
    if x.dtype in DTYPES:
        return None
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    return f"it takes {names}, x is {str(x.dtype).removeprefix('torch.')}"


def declare(operator: str, direction: str, schema: str, shapes: Callable[..., Any]) -> Any:
    """Declare `dimr_fast::<operator>_<direction>`, which the compiled libraries implement.

    `shapes` allocates the outputs for given inputs. Returns the operator.
    """
    name = f"dimr_fast::{operator}_{direction}"

    def shapes_on_one_device(*args: Any) -> Any:
        # A single meta tensor brings a call here; what `shapes` allocates elsewhere would pass for
        # an answer.
        devices = {leaf.device for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"{name}: got tensors on {found}, expected one device")
        return shapes(*args)

    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(name, shapes_on_one_device)
    return getattr(torch.ops.dimr_fast, f"{operator}_{direction}").default
