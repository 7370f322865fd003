"""The log of a training run: lines of `log.jsonl`, and TensorBoard."""

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from dimr_fast.errors import DataUnavailableError
from dimr_fast.utils.files import write_atomically

LOG = "log.jsonl"


class TrainLog:
    """Append figures to `log.jsonl` in `folder` and, with `tensorboard`, to event files.

    Lines after `step` are removed: a killed run wrote them after its last checkpoint. A line that
    cannot be written is reported, and the run continues. Raises DataUnavailableError where
    TensorBoard is requested and missing.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self._path = folder / LOG
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        text = "".join(f"{line}\n" for line in lines if _step(line) <= step)
        write_atomically(self._path, lambda part: part.write_text(text))
        self._board = _summary_writer(folder / "tensorboard", step) if tensorboard else None

    def scalars(self, step: int, **values: float) -> None:
        """Append a line of figures."""
        with _errors_reported():
            self._append(json.dumps({"step": step, **values}) + "\n")
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)

    def _append(self, line: str) -> None:
        """Append a line, or nothing if there is no room for all of it."""
        data = line.encode()
        # Without a buffer, which would be written again when the file is closed.
        with self._path.open("ab", buffering=0) as file:
            end = file.tell()
            if file.write(data) < len(data):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def has(self, step: int, name: str) -> bool:
        """Return whether the figure `name` is logged for `step`."""
        lines = map(json.loads, self._path.read_text().splitlines())
        return any(line["step"] == step and name in line for line in lines)

    def image(self, step: int, picture: Tensor) -> None:
        """Write an image uint8 [H, W, 3] to TensorBoard, if that is in use."""
        if self._board is not None:
            self._board.add_image("samples", picture, step, dataformats="HWC")

    def close(self) -> None:
        """Close the TensorBoard event file."""
        if self._board is not None:
            with _errors_reported():
                self._board.close()


def _step(line: str) -> float:
    """Return the step of a line, or infinity for a line that is none."""
    try:
        return float(json.loads(line)["step"])
    except (KeyError, TypeError, ValueError):
        return math.inf


@contextmanager
def _errors_reported() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        tqdm.write(f"not logged: {error}")


def require_tensorboard() -> None:
    """Raise DataUnavailableError where TensorBoard is missing."""
    try:
        import tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        raise DataUnavailableError("the tensorboard package", "train") from error


def _summary_writer(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)
