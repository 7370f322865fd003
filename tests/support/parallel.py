"""Training steps in the wrappers of torch.distributed, on two processes of one machine."""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from dimr_fast import DiMR
from dimr_fast.config import preset
from dimr_fast.layers import Block
from tests.support.memory import memory_from_here
from tests.support.models import inputs_of, randomised

PROCESSES = 2


def blocks(model: DiMR) -> Iterable[nn.Module]:
    return [block for stage in model.stages for block in stage.blocks]


def sharded(model: DiMR, parts: Iterable[nn.Module]) -> nn.Module:
    """Shard each of `parts`, then the rest, with FSDP2."""
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    for part in parts:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, static_graph=True)


def ddp_with_checkpoint_wrappers(model: DiMR) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, Block))
    return ddp(model)


WRAPPERS: dict[str, Callable[[DiMR], nn.Module]] = {
    "DDP, static graph": ddp,
    "DDP, checkpoint wrappers": ddp_with_checkpoint_wrappers,
    "FSDP1": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
    "FSDP2, blocks": lambda model: sharded(model, blocks(model)),
    "FSDP2, branches": lambda model: sharded(model, model.stages),
    "FSDP2, root": lambda model: sharded(model, []),
}


def small(checkpointing: bool | str = False, norm_type: str = "TDRMSN") -> DiMR:
    torch.manual_seed(0)
    config = preset("tiny", norm_type=norm_type)
    stages = tuple(replace(s, checkpointing=checkpointing) for s in config.stage_configs)
    return randomised(DiMR(replace(config, stage_configs=stages))).train()


def train(module: nn.Module, given: dict[str, Tensor], steps: int = 2) -> None:
    """Make steps of gradient descent on the mean squared prediction of each branch."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(steps):
        sum(p.square().mean() for p in module(**given)).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights_after_training(rank: int, cases: list[tuple[str, dict[str, Any]]], out: Path) -> None:
    """Train on this process's half of a batch of four; rank 0 saves the whole weights of each case.

    A case is the name of a wrapper and the settings of `small`.
    """
    results = []
    for wrapper, settings in cases:
        model = small(**settings)
        half = {name: t.chunk(PROCESSES)[rank] for name, t in inputs_of(model, 4).items()}
        module = WRAPPERS[wrapper](model)
        train(module, half)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        results.append(get_model_state_dict(module, options=options))
    if rank == 0:
        torch.save(results, out)


def large() -> DiMR:
    """Return a deep model of 150 MB of weights, on the meta device, for images of 16×16 pixels."""
    config = preset("tiny")
    first, *others = config.stage_configs
    first = replace(first, dim=512, hidden_dim=1024, num_blocks=13)
    with torch.device("meta"):
        return DiMR(replace(config, stage_configs=(first, *others)))


def peak_memory(rank: int, wrapper: str, out: Path) -> None:
    """Save the bytes that this process has needed at most for a training step.

    The weights are made after they were sharded: no process ever has all of them. A small model is
    trained first: in its first step a wrapper imports modules of PyTorch, which take memory.
    """
    first = small()
    train(WRAPPERS[wrapper](first) if wrapper else first, inputs_of(first, 1), 1)
    model = large()
    given = inputs_of(model, 1)
    used = memory_from_here()
    module = WRAPPERS[wrapper](model) if wrapper else model
    module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.01)
    train(module, given, 1)
    if rank == 0:
        torch.save(used(), out)


def _process(rank: int, processes: int, folder: str, job: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes
    )
    job(rank, *args, Path(folder, "result"))
    dist.destroy_process_group()


def run(job: Callable[..., None], *args: Any, processes: int = PROCESSES) -> Any:
    """Run `job(rank, *args, path)` in new processes; return what rank 0 has saved in `path`."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (processes, folder, job, *args), nprocs=processes)
        return torch.load(Path(folder, "result"), weights_only=True)
