"""Folders of labelled images: list, decode and crop them."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

from dimr_fast.data.scaling import PixelScale
from dimr_fast.errors import UnreadableImageError

EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm"),
    *(".png", ".ppm", ".tif", ".tiff", ".webp"),
)
"""File name extensions of images, in any case; other files are ignored."""

IGNORED_FOLDERS = {
    *("__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information"),
    *("@eaDir", "#recycle", "@Recycle", "@Recently-Snapshot"),
}
"""Folders that operating systems, archives and network drives add: copies, thumbnails, waste."""

LONGEST = 16
"""Images longer than this many times their width are cut to it before they are resized: enlarged as
a whole, a line of 60,000 pixels would take gigabytes."""

# Pillow limits a text or colour profile to 1 MiB, and all texts of an image to 64 MiB: the second
# limit suffices against decompression bombs.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)

_SCALE_SAMPLE = 512
"""Maximum number of images for the pixel scale: reading all of a large folder would take hours."""


@dataclass(frozen=True)
class ImageFiles:
    """Image files below `root`: paths relative to it, sorted by class, then by name.

    `labels`, int64 [N], index `classes`.
    """

    root: Path
    names: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]

    def fingerprint(self) -> str:
        """Return the SHA-256 of all names and file sizes."""
        digest = hashlib.sha256()
        for name in self.names:
            path = self.root / name
            size = path.stat().st_size if path.exists() else -1
            digest.update(os.fsencode(f"{name}\0{size}\n"))
        return digest.hexdigest()


def list_images(folder: Path) -> ImageFiles:
    """List the images of a folder without opening them.

    Each sub-folder is a class with its name, and holds images at any depth; classes are numbered
    in alphabetical order. A folder with images and without sub-folders is one class with the
    folder's name. Names that begin with a dot and `IGNORED_FOLDERS` are ignored; links are
    followed.

    Raises ValueError where there is no folder, where it has both images and sub-folders, where a
    class has no image and where a link leads to a folder above it; OSError where a sub-folder
    cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"image folder: got {folder}, expected an existing folder")
    with os.scandir(folder) as entries:
        seen = [(entry.name, entry.is_dir()) for entry in entries if entry.name[0] != "."]
    classes = tuple(
        sorted(name for name, is_folder in seen if is_folder and name not in IGNORED_FOLDERS)
    )
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
    """Read an image and crop its centre square: uint8 RGB [3, size, size].

    EXIF orientation is applied; transparent pixels are composited over white; of several frames the
    first is read; 16-bit values are converted to 8 bits. The crop is the one of the published
    ImageNet latents and of ADM's reference statistics: halve with a box filter while the short side
    is at least 2·size, resize it to `size` bicubically with antialiasing, then crop. Smaller images
    are enlarged. See `LONGEST` for extremely long ones.

    Raises UnreadableImageError for a file that is missing, damaged or no image.
    """
    image = decode_image(path)
    longest = LONGEST * min(image.size)
    if max(image.size) > longest:
        image = _crop_centre(image, min(image.width, longest), min(image.height, longest))
    while min(image.size) >= 2 * size:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, Image.Resampling.BOX)
    scale = size / min(image.size)
    whole = (round(image.width * scale), round(image.height * scale))
    image = image.resize(whole, Image.Resampling.BICUBIC)
    square = np.array(_crop_centre(image, size, size))
    return torch.from_numpy(square).permute(2, 0, 1).contiguous()


def _crop_centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def find_unreadable(folder: Path) -> dict[str, str]:
    """Decode every image of a folder; return the unreadable files with reasons. Shows progress."""
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
    """Training examples from a folder of images (see `list_images`), decoded when they are read.

    The pixel scale is measured when it is first used, on at most 512 evenly spaced images, the only
    ones that are decoded in advance; images of one single colour have none (ValueError). `read`
    raises UnreadableImageError at an unreadable image and names it; `find_unreadable` names all of
    them. Raises ValueError for a folder that `list_images` refuses and a size below 1.
    """

    def __init__(self, path: Path, size: int) -> None:
        if size < 1:
            raise ValueError(f"size: got {size}, expected 1 or more pixels")
        self.files = list_images(path)
        self.classes = self.files.classes
        self.labels = self.files.labels
        self.shape = (3, size, size)

    @cached_property
    def scale(self) -> PixelScale:
        """Scale that standardises the images."""
        return _pixel_scale(self)

    def fingerprint(self) -> str:
        """Return the fingerprint of the files' names and sizes."""
        return self.files.fingerprint()

    def read(self, indices: Tensor, mirrored: Tensor) -> Tensor:
        """Read the images at `indices` [B], mirrored where `mirrored`: uint8 [B, 3, size, size]."""
        images = torch.empty(len(indices), *self.shape, dtype=torch.uint8)
        wanted = zip(indices.tolist(), mirrored.tolist(), strict=True)
        for place, (index, mirror) in enumerate(wanted):
            image = self._read(index)
            images[place] = image.flip(2) if mirror else image
        return images

    def _read(self, index: int) -> Tensor:
        return read_image(self.files.root / self.files.names[index], self.shape[1])


def _pixel_scale(folder: ImageFolder) -> PixelScale:
    """Measure `PixelScale.of` evenly spaced images by a histogram, without storing the images."""
    total = len(folder.labels)
    count = min(total, _SCALE_SAMPLE)
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
    """Return whether a file name has an image's extension and is not hidden."""
    return name[0] != "." and os.path.splitext(name)[1].lower() in EXTENSIONS


def images_below(root: Path, folder: str) -> Iterator[str]:
    """Yield image paths relative to `root`, also broken links; reading them raises an error.

    Raises as `list_images` does.
    """
    # A link to one of these, or to a folder above one, would repeat the images without end.
    above = [os.path.realpath(root)]

    def below(inside: str) -> Iterator[str]:
        path = root / inside
        with os.scandir(path) as entries:
            seen = [(e.name, e.is_dir(), e.is_symlink()) for e in entries if e.name[0] != "."]
        for name, is_folder, is_link in seen:
            if not is_folder:
                if is_image(name):
                    yield f"{inside}/{name}"
            elif name not in IGNORED_FOLDERS:
                target = os.path.realpath(path / name) if is_link else None
                if target is not None:
                    above.append(os.path.realpath(path))
                    if any(Path(other).is_relative_to(target) for other in above):
                        raise ValueError(
                            f"image folder: got {path / name}, a link to {target}, expected no "
                            "link to a folder above it"
                        )
                yield from below(f"{inside}/{name}")
                if target is not None:
                    above.pop()

    return below(folder)


def decode_image(path: Path) -> Image.Image:
    """Decode a whole image to RGB as `read_image` does. Raises UnreadableImageError likewise."""
    try:
        with Image.open(path) as file:
            raw_mode = _raw_mode(file)
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):
                largest = 4095 if raw_mode == "I;12" else 65_535
                tags = getattr(file, "tag_v2", {})  # of a TIFF file
                inverted = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
                image = _to_8_bits(image, largest, inverted)
            elif image.mode == "F":
                raise ValueError("its pixels are real numbers of unknown range")
            elif image.has_transparency_data:
                value: Any = image.info.get("transparency")
                # Pillow leaves the transparent value of a PNG file in units of the file's samples.
                if raw_mode in ("L;2", "L;4"):
                    image.info["transparency"] = value * (85 if raw_mode == "L;2" else 17)
                elif raw_mode == "RGB;16B" and value is not None:
                    image.info["transparency"] = tuple(sample >> 8 for sample in value)
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImageError(f"{path}: not a readable image ({reason})", reason) from error


def _raw_mode(file: Image.Image) -> object:
    """Return Pillow's name of the samples in an opened file, which loading forgets, such as
    "L;4"."""
    tiles = getattr(file, "tile", None)
    if not tiles:
        return None
    arguments = tiles[0][3]
    return arguments[0] if isinstance(arguments, tuple) and arguments else arguments


def _to_8_bits(image: Image.Image, largest: int, inverted: bool) -> Image.Image:
    """Convert gray values 0..`largest` to 0..255; `inverted`: 0 is white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > largest:
        raise ValueError(f"its pixels are integers outside 0..{largest}, of unknown range")
    gray = (values * 255 / largest).astype(np.uint8)
    if inverted:
        gray = 255 - gray
    transparent = image.info.get("transparency")
    if transparent is not None:
        gray[values == transparent] = 255
    return Image.fromarray(gray)
