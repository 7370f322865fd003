"""Count a model's floating-point operations and its least memory traffic from its shapes.

The published execution runs on the meta device, forward and backward, and every matrix product and
convolution is counted; pointwise work is not, as in the published figures. Other executions do the
same work, but may hide it in operators that torch's counter does not know.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from benchmarks.model.published import PublishedDiMR
from dimr_fast import DiMRConfig


@dataclass(frozen=True)
class Work:
    """Work of one forward pass of one image.

    `elements` are read or written once if all pointwise work is fused: inputs and outputs of each
    linear layer, convolution and attention. `parameters` are read once per batch.
    """

    flops: int
    elements: int
    parameters: int

    def bytes(self, batch: int, itemsize: int) -> float:
        """Return the bytes moved per image, at `itemsize` bytes an element."""
        return (self.elements + self.parameters / batch) * itemsize


class _Traffic(TorchDispatchMode):
    """Count elements that linear layers and convolutions read and write, without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "convolution"):
            read = args[1] if name == "addmm" else args[0]
            self.elements += read.numel() + result.numel()
        return result


@cache
def work(config: DiMRConfig) -> Work:
    """Return the work of one image forward."""
    with torch.no_grad(), FlopCounterMode(display=False) as counted, _Traffic() as moved:
        model, run = _prepared(config)
        run()
    attention = sum(
        4 * (b.max_height * b.max_width + 1) * b.dim * (b.num_blocks // 2 * 2 + 1)
        for b in config.stage_configs
        if b.block_type == "TransformerBlock"
    )
    parameters = sum(p.numel() for p in model.parameters())
    return Work(counted.get_total_flops(), moved.elements + attention, parameters)


@cache
def backward_flops(config: DiMRConfig) -> int:
    """Return the FLOP of a backward pass of one image, without its forward pass."""
    model, run = _prepared(config)
    loss = sum(prediction.square().mean() for prediction in run())
    counting = {torch.ops.aten.convolution_backward: _convolution_gradients}
    with FlopCounterMode(display=False, custom_mapping=counting) as counted:
        torch.autograd.grad(loss, list(model.parameters()))
    return counted.get_total_flops()


def _convolution_gradients(
    dy: list[int], x: list[int], weight: list[int], *options: Any, out_shape: Any
) -> int:
    """Count as many FLOP for each gradient as forward; torch's own count ignores groups."""
    *_, wanted = options
    return sum(wanted[:2]) * conv_flop_count(x, weight, dy)


def flops(config: DiMRConfig) -> int:
    """Return the FLOP of one image forward, two for each multiply-add."""
    return work(config).flops


def _prepared(config: DiMRConfig) -> tuple[PublishedDiMR, Callable[[], list[torch.Tensor]]]:
    """Return a model on the meta device, and a call of it on one image."""
    with torch.device("meta"):
        model = PublishedDiMR(config, checkpointing=False)
        x = torch.empty(1, config.channels, *config.image_size)
        log_snr, y = torch.empty(1), torch.empty(1, dtype=torch.int64)
    return model, lambda: model(x, log_snr=log_snr, y=y)
