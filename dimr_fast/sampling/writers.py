"""Write drawn images as files, each atomically."""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from dimr_fast.utils.files import write_atomically

SAMPLE_REPORT = "sample.json"
"""File beside the images that holds all settings of the sampling job."""


def write_array(array: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write a numpy file."""

    def write(part: Path) -> None:
        with part.open("wb") as file:  # numpy would append ".npy" to a path
            np.save(file, array)

    write_atomically(path, write)


def is_array(path: Path, shape: tuple[int, ...]) -> bool:
    """Return whether a file is a whole numpy file of uint8 values of this shape."""
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError):
        return False
    return found.dtype == np.uint8 and found.shape == shape


def write_png(image: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write an image uint8 [H, W, 3] as a PNG file."""
    picture = Image.fromarray(image)
    write_atomically(path, lambda part: picture.save(part, format="PNG"))


def write_npz(shards: Sequence[Path], labels: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write images as the ADM evaluation suite reads them: `arr_0` uint8 [N, H, W, 3].

    `labels` [N] become `arr_1`. `shards` are numpy files [n, 3, H, W] with the images in order,
    read one at a time: tens of thousands of images are many gigabytes.
    """
    channels, height, width = np.load(shards[0], mmap_mode="r").shape[1:]
    shape = (len(labels), height, width, channels)

    def write(unfinished: Path) -> None:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as file:
            with _array(file, "arr_0", np.dtype(np.uint8), shape) as out:
                for shard in shards:
                    out.write(np.ascontiguousarray(np.load(shard).transpose(0, 2, 3, 1)).data)
            with _array(file, "arr_1", labels.dtype, labels.shape) as out:
                out.write(np.ascontiguousarray(labels).data)

    write_atomically(path, write)


def _array(file: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> IO[bytes]:
    """Open an array of an npz file, to be filled with its values in row-major order."""
    # ZipInfo has a constant date by default, so the same images give the same file.
    out = file.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, header)
    return out
