"""Open the examples that a `data:` setting names."""

import os
from pathlib import Path

from dimr_fast.data.arrays import ImageArray
from dimr_fast.data.examples import Examples
from dimr_fast.data.features import holds_features
from dimr_fast.data.images import ImageFolder
from dimr_fast.data.latents import MANIFEST, LatentShards
from dimr_fast.data.tiles import load_tiles

TILE_STRIDE = 16
"""Distance of neighbouring training tiles in pixels: half a tile of the demo."""


def open_examples(data: str, image_size: int | None, default_size: int) -> Examples:
    """Open "tiles", a folder of images or a folder of latents.

    Images become squares of `image_size` pixels, or `default_size` if that is None. Latents have
    their own size. Raises FileNotFoundError where there is no such folder, ValueError for an
    unusable one and for latents with an `image_size`, DataUnavailableError without the tiles'
    package.
    """
    size = image_size or default_size
    if data == "tiles":
        tiles = load_tiles(size, TILE_STRIDE)
        return ImageArray(tiles.train_images, tiles.train_labels, tiles.classes)
    folder = Path(os.path.expanduser(data))
    if not folder.is_dir():
        raise FileNotFoundError(f"data: got {data!r}, expected 'tiles' or a folder")
    if holds_features(folder) and not (folder / MANIFEST).exists():
        raise ValueError(
            f"data: got {data!r}, features of the published code, expected 'tiles', images or "
            f"latents; copy them first: dimr-fast extract --from-features {data} --output FOLDER"
        )
    if not (folder / MANIFEST).exists():
        return ImageFolder(folder, size)
    if image_size is not None:
        raise ValueError(f"image_size: got {image_size}, expected none: latents have their own")
    return LatentShards(folder)
