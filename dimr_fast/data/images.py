"""Folders of labelled images: found, decoded, and cropped to squares."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from dimr_fast.data.scaling import PixelScale

EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm"),
    *(".png", ".ppm", ".tif", ".tiff", ".webp"),
)
"""What counts as an image, in small or capital letters; other files are not looked at."""

_MOST_SAMPLED = 512


class UnreadableImageError(OSError):
    """A file with an image's extension that cannot be decoded; `reason` is why."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ImageFiles:
    """Images below `root`: names relative to it, in order of class, then name.

    `labels`, int64 [N], index `classes`.
    """

    root: Path
    names: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]

    def fingerprint(self) -> str:
        """SHA-256 of all names and file sizes: it changes when images are added or replaced."""
        digest = hashlib.sha256()
        for name in self.names:
            path = self.root / name
            size = path.stat().st_size if path.exists() else -1
            digest.update(os.fsencode(f"{name}\0{size}\n"))
        return digest.hexdigest()


def list_images(folder: Path) -> ImageFiles:
    """The images of a folder, none of them opened yet.

    Each sub-folder is a class, named after it, with the images at any depth below; classes are
    numbered in order of their names. A folder with images and no sub-folders is one class, named
    after itself. Names that begin with a dot are passed over.

    Raises ValueError where there is no folder, where images lie beside class folders, and where
    a class has none.
    """
    if not folder.is_dir():
        raise ValueError(f"image folder: got {folder}, expected an existing folder")
    with os.scandir(folder) as entries:
        seen = [(entry.name, entry.is_dir()) for entry in entries if entry.name[0] != "."]
    classes = tuple(sorted(name for name, is_folder in seen if is_folder))
    loose = sorted(name for name, is_folder in seen if not is_folder and is_image(name))
    if loose and classes:
        raise ValueError(
            f"image folder: got {folder} with images ({loose[0]}, …) beside folders "
            f"({classes[0]}, …), expected one or the other"
        )
    if loose:
        labels = torch.zeros(len(loose), dtype=torch.int64)
        return ImageFiles(folder, tuple(loose), labels, (folder.resolve().name,))
    found = [sorted(images_below(folder, name)) for name in classes]
    counts = torch.tensor([len(names) for names in found], dtype=torch.int64)
    empty = [name for name, names in zip(classes, found, strict=True) if not names]
    if empty or not classes:
        raise ValueError(
            f"image folder: got {folder / empty[0] if empty else folder} without images, expected "
            f"some of {', '.join(EXTENSIONS)}"
        )
    names = tuple(name for names in found for name in names)
    return ImageFiles(folder, names, torch.arange(len(classes)).repeat_interleave(counts), classes)


def read_image(path: Path, size: int) -> Tensor:
    """The centre square of an image, uint8 RGB [3, size, size].

    Upright as its EXIF data says; transparent parts are laid over white; of several frames the
    first; 16 bits become 8. The crop is that of published ImageNet latents and of ADM's reference
    statistics: halved by boxes while the short side is at least 2·size, resized bicubically with
    antialiasing until it is `size`, then cut. Smaller images are enlarged.

    Raises UnreadableImageError for a file that is missing, damaged or no image.
    """
    image = decode_image(path)
    while min(image.size) >= 2 * size:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, Image.Resampling.BOX)
    scale = size / min(image.size)
    whole = (round(image.width * scale), round(image.height * scale))
    image = image.resize(whole, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    square = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(square).permute(2, 0, 1).contiguous()


def find_unreadable(folder: Path) -> dict[str, str]:
    """Decode every image of a folder, with a progress bar; the unreadable ones and the reasons."""
    files = list_images(folder)

    def reason(name: str) -> str | None:
        try:
            decode_image(folder / name)
        except UnreadableImageError as error:
            return error.reason
        return None

    with ThreadPoolExecutor() as pool:
        reasons = tqdm(pool.map(reason, files.names), "decoding", len(files.names), unit="image")
        return {n: text for n, text in zip(files.names, reasons, strict=True) if text is not None}


class ImageFolder:
    """The images of a folder (see `list_images`) as training examples, decoded when they are read.

    Nothing is checked ahead of reading but the at most 512 images, evenly spaced, whose mean and
    standard deviation are the scale. `read` stops at an unreadable image with
    UnreadableImageError, which names it; `find_unreadable` names all. ValueError for a folder
    that `list_images` refuses, a size below 1 and images of one single colour.
    """

    def __init__(self, path: Path, size: int) -> None:
        if size < 1:
            raise ValueError(f"size: got {size}, expected 1 or more pixels")
        self.files = list_images(path)
        self.classes = self.files.classes
        self.labels = self.files.labels
        self.shape = (3, size, size)
        self.scale = _pixel_scale(self)

    def fingerprint(self) -> str:
        """That of the files, by their names and sizes."""
        return self.files.fingerprint()

    def read(self, indices: Tensor, mirrored: Tensor) -> Tensor:
        """The images at int64 `indices` [B], mirrored where bool [B] says; uint8 [B, 3, s, s]."""
        images = torch.empty(len(indices), *self.shape, dtype=torch.uint8)
        wanted = zip(indices.tolist(), mirrored.tolist(), strict=True)
        for place, (index, mirror) in enumerate(wanted):
            image = self._read(index)
            images[place] = image.flip(2) if mirror else image
        return images

    def _read(self, index: int) -> Tensor:
        return read_image(self.files.root / self.files.names[index], self.shape[1])


def _pixel_scale(folder: ImageFolder) -> PixelScale:
    """What PixelScale.of gives of evenly spaced images, without holding them all."""
    total = len(folder.labels)
    count = min(total, _MOST_SAMPLED)
    histogram = torch.zeros(256, dtype=torch.int64)
    for place in range(count):
        pixels = folder._read(place * total // count).flatten()
        histogram += torch.bincount(pixels, minlength=256)
    values = torch.arange(256, dtype=torch.float64)
    mean = (histogram * values).sum() / histogram.sum()
    variance = (histogram * (values - mean) ** 2).sum() / (histogram.sum() - 1)
    if variance == 0:
        raise ValueError(f"image folder: got {folder.files.root}, whose images have one colour")
    return PixelScale(round(mean.item(), 3), round(variance.sqrt().item(), 3))


def is_image(name: str) -> bool:
    """Whether the name of a file is that of an image; hidden files are none."""
    return name[0] != "." and os.path.splitext(name)[1].lower() in EXTENSIONS


def images_below(root: Path, folder: str) -> Iterator[str]:
    """Names relative to `root`. Broken links are among them, to be reported when they are read."""
    for path, folders, names in os.walk(root / folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        inside = os.path.relpath(path, root)
        yield from (f"{inside}/{name}" for name in names if is_image(name))


def decode_image(path: Path) -> Image.Image:
    """The whole image in RGB, as `read_image` says; UnreadableImageError likewise."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            elif image.mode == "F":
                raise ValueError("its pixels are real numbers of unknown range")
            elif image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except Exception as error:  # damaged files make decoders fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImageError(f"{path}: not a readable image ({reason})", reason) from error
