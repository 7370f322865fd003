"""The published optimizer (AdamW with parameter groups), Muon, and the EMA of weights."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim.adamw import adamw as adamw_step

from dimr_fast.utils.validation import require

NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x³ and x⁵: those of `torch.optim.Muon`. They are chosen for a steep slope at zero, so that
five steps bring small singular values near 1."""
MAX_BATCH_ELEMENTS = 2**26
"""Most numbers in one batch of matrices (256 MiB in fp32), which bounds the memory of a step."""


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
    decayed, exempt = _weight_decay_groups(model)
    return torch.optim.AdamW(
        [decayed, exempt], lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True
    )


def _weight_decay_groups(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the group of parameters with weight decay, and that of `nodecay_*` without."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups["nodecay_" not in name].append(parameter)
    return {"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}


def muon(
    model: nn.Module,
    learning_rate: float,
    *,
    betas: tuple[float, float] = (0.99, 0.99),
    momentum: float = 0.95,
    weight_decay: float = 0.03,
    dtype: torch.dtype = torch.float32,
) -> "MuonAdamW":
    """Return Muon for the weights of linear layers, and AdamW for all other parameters.

    Linear layers are those of blocks, long skip connections and cascade, which map features to
    features: for such matrices Muon was made. Embeddings, TD vectors, norms, biases and
    convolutions (depthwise ones and heads) have no such product, so they keep AdamW, with `betas`.
    Weight decay applies as in `adamw`. `dtype` is that of Muon's matrix products: bfloat16 is
    faster where the device has instructions for it.

    Raises ValueError for an argument out of range.
    """
    require(learning_rate >= 0, "learning_rate", learning_rate, "0 or more")
    require(all(0 <= beta < 1 for beta in betas), "betas", betas, "two numbers in 0 <= beta < 1")
    require(0 <= momentum < 1, "momentum", momentum, "0 <= momentum < 1")
    require(weight_decay >= 0, "weight_decay", weight_decay, "0 or more")
    known = (torch.float32, torch.bfloat16, torch.float64)
    require(dtype in known, "dtype", dtype, "float32, bfloat16 or float64")
    linear = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    decayed, exempt = _weight_decay_groups(model)
    matrices = [p for p in decayed["params"] if p in linear]
    others = [p for p in decayed["params"] if p not in linear]
    settings = {"lr": learning_rate, "betas": betas, "momentum": momentum, "dtype": dtype}
    return MuonAdamW(
        [{"params": matrices, "orthogonal": True}, {"params": others}, exempt],
        settings | {"weight_decay": weight_decay},
    )


class MuonAdamW(torch.optim.Optimizer):
    """Muon for groups with `orthogonal=True`, which hold matrices; AdamW for the others.

    A matrix moves by its orthogonalised momentum (Jordan 2024), scaled so that the root mean square
    of an update is 0.2 times the learning rate, about as large as AdamW's (Liu et al. 2025,
    arXiv 2502.16982). One learning rate and one weight decay therefore serve both. The step of a
    matrix is that of `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, but all matrices of
    one shape are orthogonalised at once, and in the group's `dtype`. Of FSDP2's shards, each
    process gathers and orthogonalises some of the matrices of a shape.

    One optimizer, not one of each kind: a gradient scaler then skips a step as a whole.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], defaults: dict[str, Any]) -> None:
        # `fused` keeps AdamW's step counts on the device when a state dict is loaded.
        super().__init__(groups, {"orthogonal": False, "eps": 1e-8, "fused": True} | defaults)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["orthogonal"]:
                for batch in _batches_of_one_shape(parameters):
                    self._step_muon(group, batch)
            else:
                self._step_adamw(group, parameters)
        return loss

    def _step_muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Update matrices of one shape."""
        rate, momentum = group["lr"], group["momentum"]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
        averages = [self.state[p]["momentum_buffer"] for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_lerp_(_locals(averages), _locals(gradients), 1 - momentum)
        # Nesterov's momentum: the average as it will be if the next gradient equals this one.
        ahead = torch._foreach_lerp(gradients, averages, momentum)
        updates = _orthogonalized(torch.stack(ahead), group["dtype"])
        weights = _locals(parameters)
        torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
        # An orthogonal matrix has root mean square 1/√(its longer side).
        scale = 0.2 * math.sqrt(max(parameters[0].shape))
        torch._foreach_add_(weights, updates.to(weights[0].dtype).unbind(), alpha=-rate * scale)

    def _step_adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Update parameters as `torch.optim.AdamW` does, with the same state."""
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
                }
        states = [self.state[p] for p in parameters]
        beta1, beta2 = group["betas"]
        adamw_step(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def state_names(optimizer: torch.optim.Optimizer) -> dict[Tensor, tuple[str, ...]]:
    """Return the names of the state of each parameter, of an optimizer of this module."""
    names = {True: ("momentum_buffer",), False: ("step", "exp_avg", "exp_avg_sq")}
    return {
        parameter: names[group.get("orthogonal", False)]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return matrices with the same singular vectors and singular values near 1.

    `matrices` is `[N, rows, columns]`. Five Newton–Schulz steps, in `dtype`, bring singular values
    of at least 0.002 times the matrix's Frobenius norm into 0.68 to 1.21, up to rounding. Smaller
    ones stay below, and a matrix of zeros stays zero.
    """
    rows, columns = matrices.shape[-2:]
    x = matrices.mT if rows > columns else matrices  # the products are of the shorter side
    exact = torch.promote_types(dtype, torch.float32)
    norms = torch.linalg.vector_norm(x.to(exact), dim=(-2, -1), keepdim=True)
    x = (x / norms.clamp(min=1e-7)).to(dtype)
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if rows > columns else x


def _orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return this process's shard of the orthogonalised matrices; all of them if not sharded."""
    if not isinstance(matrices, DTensor):
        return orthogonalize(matrices, dtype)
    # From a part of every matrix to some whole matrices, and back.
    by_matrix = [Shard(0) if p.is_shard() else p for p in matrices.placements]
    some = cast(DTensor, matrices.to(dtype)).redistribute(placements=by_matrix)
    found = DTensor.from_local(
        orthogonalize(some.to_local(), dtype),
        some.device_mesh,
        by_matrix,
        shape=some.shape,
        stride=some.stride(),
    )
    return found.redistribute(placements=matrices.placements).to_local()


def _batches_of_one_shape(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the matrices in lists of equal shape, of at most `MAX_BATCH_ELEMENTS` numbers."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        shapes.setdefault(parameter.shape, []).append(parameter)
    batches = []
    for shape, found in shapes.items():
        count = max(1, MAX_BATCH_ELEMENTS // shape.numel())
        batches += [found[i : i + count] for i in range(0, len(found), count)]
    return batches


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
        averages = _locals(self.tensors.values())
        pairs = zip(self._parameters, averages, strict=True)
        torch._foreach_lerp_(averages, [_local(p).to(a.dtype) for p, a in pairs], 1 - decay)


def _local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a sharded parameter, else the parameter."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _locals(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [_local(tensor) for tensor in tensors]
