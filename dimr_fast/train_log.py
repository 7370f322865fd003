"""What a training run says of itself: lines of `log.jsonl`, TensorBoard, MFU."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from dimr_fast.config import DiMRConfig
from dimr_fast.data import DataUnavailableError
from dimr_fast.files import write_atomically
from dimr_fast.model import DiMR

LOG = "log.jsonl"


class TrainLog:
    """Appends to `log.jsonl` in `folder` and, with `tensorboard`, to event files beside it.

    Lines of steps after `step`, which a run that was killed wrote after its last checkpoint, are
    removed. What cannot be written later is reported, and the run goes on. Raises
    DataUnavailableError where TensorBoard is wanted and missing.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self._path = folder / LOG
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        whole = [line for line in lines if _step(line) <= step]
        text = "".join(f"{line}\n" for line in whole)
        write_atomically(self._path, lambda part: part.write_text(text))
        self._board = _summary_writer(folder / "tensorboard", step) if tensorboard else None

    def scalars(self, step: int, **values: float) -> None:
        """A line of figures."""
        with _reported():
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)

    def has(self, step: int, name: str) -> bool:
        """Whether a line of that step has that figure."""
        lines = map(json.loads, self._path.read_text().splitlines())
        return any(line["step"] == step and name in line for line in lines)

    def image(self, step: int, picture: Tensor) -> None:
        """A picture uint8 [H, W, 3], to TensorBoard only."""
        if self._board is not None:
            self._board.add_image("samples", picture, step, dataformats="HWC")

    def close(self) -> None:
        if self._board is not None:
            with _reported():
                self._board.close()


def _step(line: str) -> float:
    """The step of a line; none is before that of one that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf


@contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        tqdm.write(f"not logged: {error}")


def require_tensorboard() -> None:
    """DataUnavailableError where TensorBoard is missing."""
    try:
        import tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        raise DataUnavailableError("the tensorboard package", "train") from error


def _summary_writer(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)


@cache
def training_flops(config: DiMRConfig) -> int:
    """Floating-point operations of one image's forward and backward pass, taken as three forwards.

    Those of matrix products and convolutions, counted on the meta device.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = DiMR(config).set_implementation("reference")
        x = torch.empty(1, config.channels, *config.image_size)
        model(x, log_snr=torch.empty(1), y=torch.empty(1, dtype=torch.int64))
    return 3 * counter.get_total_flops()


@cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product, the best of five."""
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
