"""Throughput of training: images per second and model FLOPs utilisation (MFU)."""

import time
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from dimr_fast.config import DiMRConfig
from dimr_fast.model import DiMR
from dimr_fast.utils.distributed import Communicator


class Throughput:
    """Measure images per second since the start and since the last log line.

    `step` and `seconds` are those of the run when it is started or resumed.
    """

    def __init__(self, batch_size: int, step: int, seconds: float) -> None:
        self._batch_size = batch_size
        self._start = self._last = (step, seconds)

    def overall(self, step: int, seconds: float) -> float:
        """Return images per second since the run was started or resumed."""
        first_step, first_seconds = self._start
        return (step - first_step) * self._batch_size / (seconds - first_seconds)

    def since_last_call(
        self,
        step: int,
        seconds: float,
        config: DiMRConfig,
        communicator: Communicator,
        dtype: torch.dtype,
    ) -> dict[str, float]:
        """Return images per second since the last call, MFU, and `seconds`.

        MFU is the model's FLOPs per second over the peak of all devices; the peak is the measured
        rate of a large matrix product in `dtype`.
        """
        last_step, last_seconds = self._last
        self._last = (step, seconds)
        rate = (step - last_step) * self._batch_size / (seconds - last_seconds)
        peak = matmul_flops_per_second(communicator.device, dtype) * communicator.world_size
        return {
            "images_per_second": rate,
            "mfu": rate * training_flops(config) / peak,
            "seconds": seconds,
        }


@cache
def training_flops(config: DiMRConfig) -> int:
    """Return the FLOPs of one image's forward and backward pass, taken as three forward passes.

    Matrix products and convolutions are counted, on the meta device.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = DiMR(config).set_implementation("reference")
        x = torch.empty(1, config.channels, *config.image_size)
        model(x, log_snr=torch.empty(1), y=torch.empty(1, dtype=torch.int64))
    return 3 * counter.get_total_flops()


@cache
def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs per second of a large square matrix product, the best of five runs."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    seconds = []
    for _ in range(5):
        _synchronize(device)
        begun = time.perf_counter()
        a @ a
        _synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
