"""Read, write and digest tensors: safetensors files, files of torch.save, SHA-256 and CRC-32."""

import hashlib
import os
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dimr_fast.errors import CheckpointError
from dimr_fast.utils.files import write_atomically


def read_tensors(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors whose names start with `prefix`, and the metadata, of a safetensors file.

    Tensors are memory-mapped: their pages are read from the file when they are used. Raises
    CheckpointError where the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = why_unreadable(path) or str(error)
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason})") from error


def unpickle_tensors(path: Path) -> Any:
    """Read a file of torch.save: tensors, which are memory-mapped where possible, and plain values.

    Raises CheckpointError where it is missing, damaged or holds any other object.
    """
    mapped = False
    try:
        mapped = path.is_file() and zipfile.is_zipfile(path)
        if mapped:
            _verify_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        # Its text advises to run the file's code.
        if "GLOBAL" not in str(error):
            reason = why_unreadable(path) or "not a file of torch.save"
            raise CheckpointError(f"{path}: not a readable .pth file ({reason})") from None
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path) if mapped else []
        names = f" ({', '.join(unsafe)})" if unsafe else ""
        raise CheckpointError(
            f"{path}: not a readable .pth file: it holds Python objects{names}, which are not "
            "loaded, since they can run code; save the weights alone, in the project that wrote "
            'it: torch.save(model.state_dict(), "weights.pth")'
        ) from None
    except Exception as error:  # a file of another kind can raise anything
        known = None if mapped else why_unreadable(path)
        reason = known or str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: not a readable .pth file ({reason})") from error


def _verify_archive(path: Path) -> None:
    """Compare the checksums in a zip archive, which torch does not do.

    0 means that there is none (`torch.serialization.set_crc32_options`).
    """
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.CRC == 0:
                continue
            try:
                with archive.open(entry) as file:
                    while file.read(1 << 20):
                        pass
            except zipfile.BadZipFile as error:
                raise CheckpointError(
                    f"{path}: damaged: the checksum of {entry.filename} is another; copy or "
                    "download it again"
                ) from error


def why_unreadable(path: Path) -> str | None:
    """Return what a file is instead of a safetensors file, and what to do; None if unknown."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        return "there is no such file"
    except PermissionError:
        return "no permission to read it"
    except IsADirectoryError:
        return "it is a folder"
    except OSError:
        return None
    if not start:
        return "an empty file: copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; fetch it: git lfs pull"
    if start.startswith((b"PK\3\4", b"\x80\2")):  # a zip archive, or a pickle of early versions
        return f"a file of torch.save; {how_to_convert(path)}"
    return None


def how_to_convert(path: Path) -> str:
    """Return the command that makes a usable folder of a file of weights."""
    return f"convert it first: dimr-fast convert --input {path} --output FOLDER"


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file atomically. Raises OSError where it cannot be written."""
    stored = to_storable(tensors)

    def write(part: Path) -> None:
        safetensors.torch.save_file(stored, part, metadata=metadata)

    try:
        write_atomically(path, write)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def to_storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors detached, on the CPU and contiguous, as files hold them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def crc32(tensor: Tensor) -> int:
    """Return the CRC-32 of a contiguous CPU tensor's bytes."""
    return zlib.crc32(_bytes(tensor))


def sha256(*tensors: Tensor) -> str:
    """Return the SHA-256 of the tensors' bytes, one after another, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def sha256_of_named(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names and bytes, in the order of the names, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
