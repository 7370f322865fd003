"""Count the collectives of a training step, and the bytes that they carry.

    python -m benchmarks.training.communication [PRESET …]

takes steps of each preset as `dimr_fast.training` does, with DDP and with FSDP2, as one of eight
processes whose process group only notes its calls, and writes `results/communication.json`. The
last step counts: DDP arranges its buckets in the first. The number of processes changes none of
these numbers; what a process sends for them follows from the algorithm of each collective, see
`benchmarks.report.processes`.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed import fake_pg
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.model.flops import backward_flops, flops
from benchmarks.utils import machine
from benchmarks.utils.files import RESULTS
from dimr_fast import PRESETS, DiMR, DiMRConfig
from dimr_fast.diffusion import multi_scale_loss
from dimr_fast.training.config import TrainConfig
from dimr_fast.training.parallel import parallelize
from dimr_fast.utils.distributed import Communicator
from dimr_fast.utils.files import write_json

RESULT = RESULTS / "communication.json"
PROCESSES = 8
KINDS = {"allreduce": "all-reduce", "allgather": "all-gather", "reduce_scatter": "reduce-scatter"}
SHARDINGS = ("none", "fsdp2")
"""Settings of `sharding`; none is DDP."""


@dataclass
class Collectives(TorchDispatchMode):
    """Record the collectives of this process: kind and bytes of the whole tensor, in order.

    The whole tensor is that which each process has after an all-reduce or all-gather, and before a
    reduce-scatter.
    """

    calls: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # FSDP2's tensors call the collectives themselves
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1].strip("_")
            for start, kind in KINDS.items():
                if name.replace("_into_tensor", "").replace("all_", "all").startswith(start):
                    sizes = [t.nbytes for t in _tensors(args)]
                    # Outputs and inputs: the larger is the whole.
                    self.calls.append((kind, max(sizes)))
        return func(*args, **(kwargs or {}))

    def totals(self) -> dict[str, dict[str, int]]:
        """Return messages and bytes of each kind."""
        found: dict[str, dict[str, int]] = {}
        for kind, size in self.calls:
            row = found.setdefault(kind, {"messages": 0, "bytes": 0})
            row["messages"] += 1
            row["bytes"] += size
        return found


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def gradient_step(
    config: DiMRConfig, sharding: str, communicator: Communicator, batch: int
) -> tuple[DiMR, Callable[[], None]]:
    """Return a model and a function that computes its gradients as `TrainLoop` does.

    The update that follows, by AdamW, has no collectives.
    """
    torch.manual_seed(0)
    settings = TrainConfig(output=Path("unused"), sharding=sharding)  # type: ignore[arg-type]
    model = DiMR(config)
    parallel = parallelize(model, settings, communicator)
    if isinstance(parallel, nn.parallel.DistributedDataParallel):
        parallel.register_comm_hook(None, _all_reduce)
    x = torch.randn(batch, config.channels, *config.image_size)
    log_snr, y = torch.linspace(-4, 4, batch), torch.zeros(batch, dtype=torch.int64)

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            predictions = parallel(x, log_snr=log_snr, y=y)
        multi_scale_loss(predictions, x).mean().backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        communicator.all_reduce(torch.zeros(4, dtype=torch.float64))

    return model, step


def _all_reduce(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Reduce a bucket of DDP as it does itself, which expects a result of the process group."""
    buffer = bucket.buffer()
    buffer.div_(dist.get_world_size())
    dist.all_reduce(buffer)
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(buffer)
    return done


def count(config: DiMRConfig, sharding: str, communicator: Communicator) -> dict[str, Any]:
    """Return messages and bytes of one step."""
    _, step = gradient_step(config, sharding, communicator, 1)
    for _ in range(2):
        with Collectives() as collectives:
            step()
    return collectives.totals()


@contextmanager
def fake_processes(number: int) -> Iterator[Communicator]:
    """Make this process rank 0 of `number` whose collectives do nothing."""
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=number)
    try:
        yield Communicator(0, number, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def report(presets: Sequence[str]) -> dict[str, Any]:
    """Return parameters, FLOP of an image, and collectives of each preset."""
    found: dict[str, Any] = {}
    for name in presets:
        config = PRESETS[name]
        with torch.device("meta"):
            parameters = sum(p.numel() for p in DiMR(config).parameters())
        found[name] = {
            "parameters": parameters,
            "forward_flops": flops(config),
            "training_flops": flops(config) + backward_flops(config),
        }
        for sharding in SHARDINGS:
            with fake_processes(PROCESSES) as communicator:
                found[name][sharding] = count(config, sharding, communicator)
    return machine.description() | {"presets": found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=["DiMR-XL/2R", "DiMR-G/2R"])
    write_json(RESULT, report(parser.parse_args().presets))
