"""Read the features that the published code extracts: `imagenetN_features/0.npy`, `1.npy`, ….

A file holds the moments of an image [2C, h, w] and its label, as a pickled object array, or an
array of moments alone. For each batch of images, the files of the batch are followed by those of
its mirror images. numpy would unpickle any object; here only arrays of numbers and numbers are
made.
"""

import hashlib
import io
import os
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BATCH = 256
"""Images in a batch of the published script."""
FLOATS = ("f2", "f4", "f8")
INTEGERS = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")


@dataclass(frozen=True)
class Feature:
    """Moments [2C, h, w] of an image, in the stored dtype, and its label; None if it has none."""

    moments: Tensor
    label: int | None


@dataclass(frozen=True)
class FeatureFiles:
    """A folder of features of `count` images and of their mirror images."""

    root: Path
    count: int
    batch: int

    def paths(self, image: int) -> tuple[Path, Path]:
        """Return the files of an image and of its mirror image."""
        first = image // self.batch * self.batch
        size = min(self.batch, self.count - first)
        plain = 2 * first + image - first
        return self.root / f"{plain}.npy", self.root / f"{plain + size}.npy"

    def read(self, image: int) -> tuple[Tensor, int | None]:
        """Read the moments of both views [2, 2C, h, w] of an image, and its label.

        Raises OSError naming a file that cannot be read, ValueError where the two files are not of
        one image.
        """
        paths = self.paths(image)
        plain, mirrored = map(read_feature, paths)
        same_shape = plain.moments.shape == mirrored.moments.shape
        if not same_shape or plain.label != mirrored.label:
            one, other = (f"label {f.label}, {tuple(f.moments.shape)}" for f in (plain, mirrored))
            raise ValueError(
                f"from_features: got {paths[0]} ({one}) and {paths[1]} ({other}), expected an "
                "image and its mirror image; set feature_batch to the images in a batch of the "
                f"script that wrote them, unless it was {self.batch}"
            )
        return torch.stack([plain.moments, mirrored.moments]), plain.label

    def fingerprint(self) -> str:
        """Return the SHA-256 of number and batch of the images, and of the content of 16 files."""
        digest = hashlib.sha256(f"{self.count} {self.batch}\n".encode())
        for place in range(16):
            digest.update((self.root / f"{place * 2 * self.count // 16}.npy").read_bytes())
        return digest.hexdigest()


def list_features(folder: Path, batch: int = BATCH) -> FeatureFiles:
    """List a folder of features without opening them.

    Raises ValueError where there are none, one is missing or their number is odd.
    """
    wanted = "expected a folder with 0.npy, 1.npy, … of images and their mirror images"
    try:
        with os.scandir(folder) as entries:
            names = [re.fullmatch(r"(0|[1-9]\d*)\.npy", entry.name) for entry in entries]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"from_features: got {folder}, {wanted} ({error})") from error
    numbers = {int(name[1]) for name in names if name}
    missing = next((i for i in range(len(numbers)) if i not in numbers), None)
    if missing is not None:
        raise ValueError(f"from_features: got {folder} without {missing}.npy, {wanted}")
    if not numbers or len(numbers) % 2:
        raise ValueError(f"from_features: got {folder} with {len(numbers)} files, {wanted}")
    return FeatureFiles(folder, len(numbers) // 2, batch)


def holds_features(folder: Path) -> bool:
    """Return whether a folder looks like one of features."""
    return (folder / "0.npy").is_file()


def read_feature(path: Path) -> Feature:
    """Read a file of features. Raises OSError naming it where it is damaged or holds other data."""
    try:
        with path.open("rb") as file:
            return _read(io.BytesIO(file.read()))
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error) or type(error).__name__
        raise OSError(f"{path}: not readable features ({reason})") from error


def _read(file: io.BytesIO) -> Feature:
    version = np.lib.format.read_magic(file)
    header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    _, _, dtype = header(file)
    if not dtype.hasobject:
        file.seek(0)
        return Feature(_moments(np.load(file, allow_pickle=False)), None)
    found = _Unpickler(file).load()
    values = found.value() if isinstance(found, _Array) else None
    if not isinstance(values, list) or len(values) != 2:
        raise ValueError("holds other objects, expected moments and label")
    moments, label = (value.value() if isinstance(value, _Array) else value for value in values)
    if isinstance(label, np.ndarray) and label.size == 1:
        label = label.item()
    if isinstance(label, _Scalar):
        label = label.value()
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise ValueError(f"label: got {label!r}, expected a whole number, 0 or more")
    return Feature(_moments(moments), label)


def _moments(array: object) -> Tensor:
    if not isinstance(array, np.ndarray) or array.dtype.str[1:] not in FLOATS:
        raise ValueError("moments: got no array of real numbers")
    if array.ndim != 3 or array.shape[0] % 2 or 0 in array.shape:
        raise ValueError(f"moments: got shape {array.shape}, expected [2C, h, w]")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))


class _DType:
    """Stands in for numpy.dtype in a pickle: a code such as f4, and the order of bytes."""

    def __init__(self, code: str, align: object, copy: object) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def dtype(self) -> np.dtype[Any]:
        if self.code not in FLOATS + INTEGERS or self.order not in ("<", ">", "|", "="):
            raise ValueError(f"got dtype {self.order}{self.code}, expected numbers")
        return np.dtype(f"{self.order}{self.code}")


class _Array:
    """Stands in for numpy's reconstruction of an array in a pickle."""

    def __init__(self, kind: object, shape: object, code: object) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def value(self) -> Any:
        """Return the array of numbers, or the list of objects."""
        _, shape, dtype, fortran, data = self.state
        if isinstance(data, list):
            return data
        order: Any = "F" if fortran else "C"
        return np.frombuffer(data, dtype.dtype()).reshape(shape, order=order)


class _Scalar:
    """Stands in for a numpy number in a pickle."""

    def __init__(self, dtype: _DType, data: bytes) -> None:
        self.kind, self.data = dtype, data

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a number with a state")

    def value(self) -> int | float:
        number: int | float = np.frombuffer(self.data, self.kind.dtype()).item()
        return number


STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): "ndarray",  # only named, as the kind of an array
    ("numpy", "dtype"): _DType,
    **{
        (f"numpy.{core}.multiarray", name): stand_in
        for core in ("core", "_core")  # before and after numpy 2
        for name, stand_in in {"_reconstruct": _Array, "scalar": _Scalar}.items()
    },
}


class _Unpickler(pickle._Unpickler):
    """Unpickles arrays and numbers of numpy as stand-ins, and refuses every other object.

    It is the one written in Python: that in C allocates whatever sizes a damaged file states.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"holds {module}.{name}, which is not loaded")
        return STAND_INS[module, name]
