"""Measure how many bytes per image a training step saves for its backward pass.

    python -m benchmarks.model.memory [PRESET …]

writes `results/memory.json`. Counted are the tensors that autograd saves under bfloat16 autocast,
each storage once; the difference between batches of two and of one leaves out weights and their
copies.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.utils import machine
from benchmarks.utils.files import RESULTS
from dimr_fast import DiMR
from dimr_fast.utils.device import resolve_device
from dimr_fast.utils.files import write_json

RESULT = RESULTS / "memory.json"
PREDICTED_MB = {"DiMR-XL/2R": 336, "DiMR-G/2R": 577, "DiMR-XL/3R": 584}
"""Predicted per image before any code existed: inputs and statistics of norms, little else."""


def saved_bytes(model: DiMR, batch: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the bytes that a forward pass of `batch` images saves, each storage once."""
    device = next(model.parameters()).device
    config = model.config
    x = torch.randn(batch, config.channels, *config.image_size, device=device)
    log_snr = torch.linspace(-4, 4, batch, device=device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)
    storages: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage, storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
    ):
        outputs = model(x, log_snr=log_snr, y=y)
    # Outputs were alive until here, so no two storages shared an address.
    del outputs
    return sum(size for _, size in storages.values())


def bytes_per_image(model: DiMR) -> int:
    """Return the bytes that one more image adds."""
    return saved_bytes(model, 2) - saved_bytes(model, 1)


def report(presets: Sequence[str]) -> dict[str, Any]:
    """Return measured and predicted bytes per image of each preset."""
    device = resolve_device("auto")
    found = {}
    for name in presets:
        with torch.device(device):
            model = DiMR.from_preset(name)
        found[name] = {
            "bytes_per_image": bytes_per_image(model),
            "predicted_bytes_per_image": 10**6 * PREDICTED_MB[name],
        }
        del model
    return machine.description() | {"presets": found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=list(PREDICTED_MB))
    write_json(RESULT, report(parser.parse_args().presets))
