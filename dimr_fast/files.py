"""Files and folders that appear whole or not at all."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

LOCK = ".lock"
PATIENCE = 10.0  # torch's loading processes take five seconds to notice that theirs was killed


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in `path`'s place at once.

    What was at `path` stays until then, also if the machine stops. Raises whatever `write` raises,
    an OSError with `path` in it, and leaves nothing behind; only a killed process does, see
    `remove_unfinished`.
    """
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        write(unfinished)
        # safetensors' files are for their owner's eyes alone, whatever the user's custom.
        unfinished.chmod(mode)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(target)
    except OSError as error:
        # Few say which file, numpy not even that it is about one.
        raise OSError(f"{path}: could not be written ({error})") from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file. Raises OSError where it cannot be written."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        write_atomically(path, lambda part: save_file(whole, part, metadata=metadata))
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed while they wrote files in `folder` left of them.

    Nobody else may be writing there.
    """
    for path in folder.glob(".*.part"):
        if path.is_file():
            path.unlink()


def hold(folder: Path) -> IO[str]:
    """Keep other processes that hold `folder` out of it, until the result is closed.

    Also a process that is killed lets go. Raises OSError where another one still holds it after
    `PATIENCE` seconds; where the system or the file system has no locks nobody is kept out.
    """
    file = (folder / LOCK).open("w")
    deadline = time.monotonic() + PATIENCE
    while not _lock(file):
        if time.monotonic() > deadline:
            file.close()
            raise OSError(f"{folder}: another process is writing there")
        time.sleep(0.1)
    return file


def _lock(file: IO[str]) -> bool:
    """Whether no other process has locked the file, which is locked now, where there are locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def write_folder(path: str | os.PathLike[str], fill: Callable[[Path], object]) -> None:
    """Let `fill` fill a new folder beside `path`, then give it that name.

    Raises FileExistsError where there is something at `path`, and whatever `fill` raises; nothing
    is left behind then.
    """
    target = Path(path).absolute()
    if target.exists():
        raise FileExistsError(f"{path} exists already; choose another output")
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    unfinished.mkdir(parents=True)
    try:
        fill(unfinished)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def claim(folder: Path, names: Sequence[str]) -> None:
    """Make `folder` ready to take files of these names, before the work that fills them.

    Raises FileExistsError where one of them is there already, and OSError where nothing can be
    written.
    """
    for name in names:
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name} exists already; choose another output")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON."""
    write_atomically(path, lambda part: part.write_text(json.dumps(value, indent=2) + "\n"))
