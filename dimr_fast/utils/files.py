"""Write files and folders so that each appears complete or not at all; lock and digest them."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK = ".lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of file systems without locks, such as network drives without a lock service."""
LOCK_TIMEOUT = 10.0
"""Seconds to wait for a lock. If a training process is killed, its data loader workers may keep
the lock for up to five seconds."""


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Call `write` with a path in a temporary folder beside `path`, then rename it to `path`.

    The old file stays in place until the rename, even if the machine crashes. Exceptions of `write`
    are passed on (OSError with `path` in its message), and the folder is removed, with whatever a
    library may have added. Only a killed process, or a parent folder that has become read-only,
    leaves one; see `remove_unfinished`.
    """
    target = Path(path)
    folder = _unfinished(target)
    unfinished = folder / target.name
    try:
        folder.mkdir()
        unfinished.touch()
        mode = unfinished.stat().st_mode
        write(unfinished)
        # safetensors makes files that only their owner can read, whatever the umask.
        unfinished.chmod(mode)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(target)
    except OSError as error:
        # Most of these exceptions do not name the file.
        raise OSError(f"{path}: could not be written ({error})") from error
    finally:
        # An error here, as in a folder that has become read-only, would hide the one of `write`.
        shutil.rmtree(folder, ignore_errors=True)


def _unfinished(target: Path) -> Path:
    # Processes of several machines write to one folder, and may have the same number.
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON."""
    write_atomically(path, lambda part: part.write_text(json.dumps(value, indent=2) + "\n"))


def write_folder(path: str | os.PathLike[str], fill: Callable[[Path], object]) -> None:
    """Call `fill` with a temporary folder beside `path`, then rename that folder to `path`.

    Raises FileExistsError where `path` exists already, and whatever `fill` raises; then nothing is
    left behind.
    """
    target = Path(path).absolute()
    if target.exists():
        raise FileExistsError(f"{path} exists already; choose another output")
    unfinished = _unfinished(target)
    unfinished.mkdir(parents=True)
    try:
        fill(unfinished)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left in `folder` of unfinished files and folders called `name`.

    No other process may be writing these.
    """
    for path in folder.glob(f".{name}.*.part"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def prepare_output(folder: Path, names: Sequence[str]) -> None:
    """Create `folder` and check that files of these names can be written, before any work.

    Raises FileExistsError where one of them exists, and OSError where nothing can be written.
    """
    for name in names:
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name} exists already; choose another output")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def lock_folder(folder: Path, timeout: float = LOCK_TIMEOUT) -> AbstractContextManager[object]:
    """Lock `folder` against other processes until the block of the returned context ends.

    The operating system releases the lock when the process dies. Raises OSError where another
    process still holds it after `timeout` seconds. A file system without locks locks nothing.
    """
    try:
        return FileLock(folder / LOCK).acquire(timeout=timeout)
    except Timeout as error:
        raise OSError(f"{folder}: another process is writing there") from error
    except (NotImplementedError, OSError) as error:
        # filelock raises NotImplementedError for ENOSYS in some of its versions.
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        return nullcontext()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_cache() -> Path:
    """Return the platform's folder for cached files of this user (XDG_CACHE_HOME and the like)."""
    from platformdirs import user_cache_path

    return user_cache_path("dimr_fast", appauthor=False)
