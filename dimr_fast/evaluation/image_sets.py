"""Image sets to score: a folder of files, an .npz of the ADM suite, a tensor."""

import hashlib
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from dimr_fast.data.images import EXTENSIONS, decode_image, images_below
from dimr_fast.errors import UnreadableImageError
from dimr_fast.utils.files import file_sha256
from dimr_fast.utils.tensors import sha256

ROTATED_ORIENTATIONS = (5, 6, 7, 8)
"""EXIF orientations that rotate by 90 degrees, so that width and height change places."""


class ImageSet(Protocol):
    """Images of one size, read in batches in a fixed order.

    `size` is (height, width); `classes` states in words how many images each class has.
    """

    source: str
    count: int
    size: tuple[int, int]
    classes: str

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield uint8 [N, 3, h, w] on the CPU, `batch_size` images at a time."""
        ...


class StoredImages(ImageSet, Protocol):
    """An image set with a fingerprint, which needs no decoding."""

    @property
    def fingerprint(self) -> str:
        """A fingerprint of the image set: equal sets have equal fingerprints."""
        ...


def open_images(path: Path) -> StoredImages:
    """Open the images of a folder or an .npz file. Raises ValueError for none or unusable ones."""
    if path.is_dir():
        return FolderImages(path)
    if path.suffix == ".npz" and path.is_file():
        return NpzImages(path)
    raise ValueError(f"images: got {path}, expected a folder of images or an .npz file")


class TensorImages:
    """Images in memory: uint8 [N, 3, h, w]."""

    def __init__(self, images: Tensor, source: str, classes: str = "unknown") -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images: got {images.dtype} {tuple(images.shape)}, expected uint8 [N, 3, h, w]"
            )
        self.images = images.cpu().contiguous()
        self.source, self.classes = source, classes
        self.count, self.size = len(images), (images.shape[2], images.shape[3])

    @cached_property
    def fingerprint(self) -> str:
        return f"pixels {tuple(self.images.shape)} {sha256(self.images)}"

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        yield from self.images.split(batch_size)


class FolderImages:
    """Image files under a folder, sub-folders included, in the order of their paths.

    They are decoded like training images (see `data.images`) but never resized. Each sub-folder is
    a class. The constructor reads only the file headers. It raises ValueError if there is no image,
    if a file cannot be read, or if sizes differ.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = sorted(path / name for name in images_below(path, "."))
        if not self.files:
            raise ValueError(
                f"images: got {path} without images, expected some of {', '.join(EXTENSIONS)}"
            )
        sizes, unreadable = self._headers()
        if unreadable:
            raise ValueError(
                f"images: got {len(unreadable)} of {len(self.files)} files in {path} that cannot "
                f"be read, first {unreadable[0]}; expected images only"
            )
        if len(sizes) > 1:
            found = ", ".join(f"{len(files)} of {w}x{h}" for (h, w), files in sizes.items())
            rarest = min(sizes.values(), key=len)[0]
            raise ValueError(
                f"images: got several sizes in {path}: {found}, such as {rarest}; expected one"
            )
        ((self.size, _),) = sizes.items()
        self.count = len(self.files)
        kinds = Counter(f.suffix.lower().removeprefix(".") for f in self.files)
        self.source = f"{path} ({', '.join(sorted(kinds))})"
        folders = Counter(f.parent for f in self.files)
        self.classes = "unknown" if path in folders else counts_in_words(folders.values())

    def _headers(self) -> tuple[dict[tuple[int, int], list[Path]], list[Path]]:
        sizes: dict[tuple[int, int], list[Path]] = {}
        unreadable = []
        for file in self.files:
            try:
                with Image.open(file) as image:
                    width, height = image.size
                    # getexif() would read a whole PNG file, which could not be verified then.
                    exif = image.getexif() if "exif" in image.info else {}
                    if exif.get(ExifTags.Base.Orientation) in ROTATED_ORIENTATIONS:
                        width, height = height, width
                    # This reads PNG files to their end, and so detects truncated ones.
                    image.verify()
            except Exception:  # a damaged file can raise anything
                unreadable.append(file)
            else:
                sizes.setdefault((height, width), []).append(file)
        return sizes, unreadable

    @cached_property
    def fingerprint(self) -> str:
        found = hashlib.sha256()
        for file in self.files:
            status = file.stat()
            name = file.relative_to(self.path).as_posix()
            found.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return f"files {self.path.resolve()} {found.hexdigest()}"

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        # Pillow releases the GIL while it decodes.
        with ThreadPoolExecutor() as pool:
            for start in range(0, self.count, batch_size):
                files = self.files[start : start + batch_size]
                yield torch.stack(list(pool.map(self._read, files)))

    def _read(self, file: Path) -> Tensor:
        try:
            pixels = np.array(decode_image(file))
        except UnreadableImageError as error:
            reason = error.reason
            raise ValueError(f"images: got {file}, expected a whole image ({reason})") from error
        if pixels.shape[:2] != self.size:
            raise ValueError(
                f"images: got {file}, upright {pixels.shape[1]}x{pixels.shape[0]}, expected "
                f"{self.size[1]}x{self.size[0]}"
            )
        return torch.from_numpy(pixels).permute(2, 0, 1)


class NpzImages:
    """Images of an .npz as the ADM evaluation suite reads it: `arr_0`, uint8 [N, H, W, 3].

    Labels in `arr_1`, int [N], are counted. Images are read from the file batch by batch. Raises
    ValueError for a file of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        shape, dtype = _array_header(path, "arr_0")
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise ValueError(
                f"images: got arr_0 of {dtype} {shape} in {path}, expected uint8 (N, H, W, 3)"
            )
        self.count, self.size = shape[0], (shape[1], shape[2])
        self.source = str(path)
        self.classes = "unknown"
        if "arr_1" in npz_names(path):
            labels = read_arrays(path, "arr_1")["arr_1"]
            if labels.shape == (self.count,) and labels.dtype.kind in "iu":
                self.classes = counts_in_words(Counter(labels.tolist()).values())

    @cached_property
    def fingerprint(self) -> str:
        return f"npz {file_sha256(self.path)}"

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        row = (*self.size, 3)
        length = int(np.prod(row))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                _read_header(file)
                for start in range(0, self.count, batch_size):
                    rows = min(batch_size, self.count - start)
                    data = file.read(rows * length)
                    if len(data) != rows * length:
                        raise ValueError(f"images: got {self.path} cut short, expected whole")
                    pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                    yield pixels.view(rows, *row).permute(0, 3, 1, 2).contiguous()
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"images: got {self.path}, which is damaged ({error})") from error


def npz_names(path: Path) -> tuple[str, ...]:
    """Return the names of an .npz file's arrays. Raises ValueError for another kind of file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return tuple(name.removesuffix(".npy") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"images: got {path}, expected an .npz file ({error})") from error


def read_arrays(path: Path, *names: str) -> dict[str, np.ndarray[Any, Any]]:
    """Read arrays of an .npz. Raises ValueError where one is missing, damaged or holds objects."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"images: got {path}, expected arrays {names} in it ({error})") from error


def counts_in_words(counts: Iterable[int]) -> str:
    """Describe class counts, such as "6 classes, 50 images each"."""
    found = sorted(counts)
    if not found:
        return "unknown"
    each = str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]}"
    return f"{len(found)} class{'es' * (len(found) > 1)}, {each} images each"


def _array_header(path: Path, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    names = npz_names(path)
    if name not in names:
        raise ValueError(f"images: got {path} with {', '.join(names)}, expected {name} in it")
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            return _read_header(file)
    except (ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"images: got {path} with an unreadable {name} ({error})") from error


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read shape and dtype of the next array. Raises ValueError unless its order is C."""
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"npy format {version}")
    shape, fortran_order, dtype = read(file)
    if fortran_order:
        raise ValueError("columns first, expected rows first")
    return shape, dtype
