"""Bytes that a training step keeps for backward, per image: `python benchmarks/memory.py`.

What autograd saves in the forward pass under bfloat16 autocast, less what does not grow with the
batch (weights and their copies): the difference between a batch of two and of one. Every storage
counts once. Written to `results/memory.json`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dimr_fast import DiMR
from dimr_fast.utils.device import device_name, resolve_device

RESULT = Path(__file__).parent / "results" / "memory.json"
PREDICTED_MB = {"DiMR-XL/2R": 336, "DiMR-G/2R": 577, "DiMR-XL/3R": 584}
"""Per image, as predicted before the first line: norms' inputs and statistics and little else."""


def saved_bytes(model: DiMR, batch: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes saved for backward by one forward pass of `batch` images, each storage once."""
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
    # Alive until here, so that no two of them had the same address.
    del outputs
    return sum(size for _, size in storages.values())


def bytes_per_image(model: DiMR) -> int:
    """What one image more makes autograd save."""
    return saved_bytes(model, 2) - saved_bytes(model, 1)


def report(presets: Sequence[str]) -> dict[str, Any]:
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
    return {"device": device_name(device), "torch": torch.__version__, "presets": found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=list(PREDICTED_MB))
    RESULT.write_text(json.dumps(report(parser.parse_args().presets), indent=2) + "\n")
