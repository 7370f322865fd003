"""Data parallelism of training: DDP and FSDP2."""

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from dimr_fast.model import DiMR
from dimr_fast.training.config import TrainConfig
from dimr_fast.utils.distributed import Communicator


def check_batch_split(config: TrainConfig, communicator: Communicator) -> None:
    """Raise ValueError where a batch cannot be split evenly over processes and micro-batches."""
    divisor = communicator.world_size * config.accumulation
    if config.batch_size % divisor:
        raise ValueError(
            f"batch_size: got {config.batch_size}, expected a multiple of {divisor}: "
            f"{communicator.world_size} processes × {config.accumulation} micro-batches"
        )


def parallelize(model: DiMR, config: TrainConfig, communicator: Communicator) -> nn.Module:
    """Return the module to call instead of `model`, so that gradients are reduced over processes.

    FSDP2 shards `model` itself: parameters, gradients, optimizer state and EMA. Parameters stay
    gathered for a whole step, because the TD parameters of all blocks are computed at its start.
    """
    if config.sharding == "fsdp2":
        if communicator.world_size == 1:
            raise ValueError("sharding: got 'fsdp2' on one process, expected several, or none")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(communicator.device.type, (communicator.world_size,))
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        return model
    if communicator.world_size == 1:
        return model
    device = communicator.device
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def gradient_sync(module: nn.Module, enabled: bool) -> AbstractContextManager[object]:
    """Return a context in which backward passes reduce gradients over processes if `enabled`.

    Only the last micro-batch of a step needs the reduction.
    """
    set_gradient_sync = getattr(module, "set_requires_gradient_sync", None)  # FSDP2
    if set_gradient_sync is not None:
        set_gradient_sync(enabled)
    elif isinstance(module, nn.parallel.DistributedDataParallel) and not enabled:
        return module.no_sync()
    return nullcontext()
