"""Measure how many bytes per image a training step saves for its backward pass.

    python -m benchmarks.model.memory [PRESET …]

writes `results/memory.json`, for each setting of activation checkpointing. Counted is
the memory that a forward pass under bfloat16 autocast allocates and that is alive after it; the
difference between batches of two and of one leaves out weights and their copies.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.utils import machine
from benchmarks.utils.files import RESULTS
from dimr_fast import PRESETS, DiMR, DiMRConfig
from dimr_fast.utils.device import resolve_device
from dimr_fast.utils.files import write_json

RESULT = RESULTS / "memory.json"
PREDICTED_MB = {"DiMR-XL/2R": 336, "DiMR-G/2R": 577, "DiMR-XL/3R": 584}
"""Predicted per image before any code existed: inputs and statistics of norms, little else."""


class Storages(TorchDispatchMode):
    """Records the memory that operators return, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.bytes[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def alive(self) -> int:
        """Return the bytes that something still refers to, each storage once."""
        return sum(size for storage, size in self.bytes.items() if not storage.expired())


def saved_bytes(model: DiMR, batch: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the bytes that a forward pass of `batch` images leaves behind, less its outputs."""
    device = next(model.parameters()).device
    config = model.config
    x = torch.randn(batch, config.channels, *config.image_size, device=device)
    log_snr = torch.linspace(-4, 4, batch, device=device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)
    with Storages() as storages, torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        outputs = model(x, log_snr=log_snr, y=y)
    return storages.alive() - sum(output.untyped_storage().nbytes() for output in outputs)


def bytes_per_image(model: DiMR) -> int:
    """Return the bytes that one more image adds."""
    return saved_bytes(model, 2) - saved_bytes(model, 1)


def with_checkpointing(config: DiMRConfig, mode: Any) -> DiMRConfig:
    """Return a configuration whose branches all have this setting of `checkpointing`."""
    branches = (dataclasses.replace(b, checkpointing=mode) for b in config.stage_configs)
    return dataclasses.replace(config, stage_configs=tuple(branches))


MODES = {
    "bytes_per_image": False,
    "selective_bytes_per_image": "selective",
    "checkpointed_bytes_per_image": True,
}
"""The names in the results of the settings of `checkpointing`."""


def report(presets: Sequence[str]) -> dict[str, Any]:
    """Return measured and predicted bytes per image of each preset."""
    device = resolve_device("auto")
    found = {}
    for name in presets:
        found[name] = {"predicted_bytes_per_image": 10**6 * PREDICTED_MB[name]}
        for key, mode in MODES.items():
            with torch.device(device):
                model = DiMR(with_checkpointing(PRESETS[name], mode))
            found[name][key] = bytes_per_image(model)
            del model
    return machine.description() | {"presets": found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=list(PREDICTED_MB))
    write_json(RESULT, report(parser.parse_args().presets))
