"""The published optimizer (AdamW with parameter groups) and the EMA of weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def adamw(
    model: nn.Module,
    learning_rate: float,
    *,
    betas: tuple[float, float] = (0.99, 0.99),
    weight_decay: float = 0.03,
) -> torch.optim.AdamW:
    """Return a fused AdamW with the published parameter groups.

    Weight decay applies to all parameters, norms and embeddings too, except the `nodecay_*` vectors
    of time-dependent parameters. The defaults are the published values.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups["nodecay_" not in name].append(parameter)
    exempt: dict[str, Any] = {"params": groups[False], "weight_decay": 0.0}
    return torch.optim.AdamW(
        [{"params": groups[True]}, exempt],
        lr=learning_rate,
        betas=betas,
        weight_decay=weight_decay,
        fused=True,
    )


class EMA:
    """Exponential moving average of a model's parameters, by name, updated in one call.

    `tensors` starts as a copy of the parameters, sharded like them (FSDP2), in fp32 for parameters
    in half precision, which would round most updates away. DiMR has no buffers, so
    `model.load_state_dict(ema.tensors)` loads the average.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters: list[Tensor] = list(model.parameters())
        self.tensors = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Set the average to `decay · average + (1 − decay) · parameters`.

        Raises ValueError where `decay` is not in 0 <= decay < 1.
        """
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {decay}, expected 0 <= decay < 1")
        averages = [_local(tensor) for tensor in self.tensors.values()]
        pairs = zip(self._parameters, averages, strict=True)
        torch._foreach_lerp_(averages, [_local(p).to(a.dtype) for p, a in pairs], 1 - decay)


def _local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a sharded parameter, else the parameter."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
