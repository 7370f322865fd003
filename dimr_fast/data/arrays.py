"""Training examples from images in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dimr_fast.data.scaling import PixelScale
from dimr_fast.utils.tensors import sha256


class ImageArray:
    """Training examples: images uint8 [N, C, H, W] with int64 labels [N] that index `classes`.

    Pixels are standardised over all images. Raises ValueError for other dtypes or shapes, for no
    images, and for labels outside the classes.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4 or len(images) == 0:
            raise ValueError(
                f"images: got {images.dtype} {tuple(images.shape)}, expected uint8 [N, C, H, W]"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels: got {labels.dtype} {tuple(labels.shape)}, expected int64 [{len(images)}]"
            )
        if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise ValueError(
                f"labels: got {int(labels.min())}..{int(labels.max())}, "
                f"expected 0..{len(classes) - 1} as there are classes"
            )
        self.images = images
        self.labels = labels
        self.classes = tuple(classes)
        self.scale = PixelScale.of(images)
        channels, height, width = images.shape[1:]
        self.shape = (channels, height, width)

    def fingerprint(self) -> str:
        """Return the SHA-256 of all pixels and labels."""
        return sha256(self.images, self.labels)

    def read(self, indices: Tensor, mirrored: Tensor) -> Tensor:
        """Return the images at `indices`, mirrored where `mirrored`: uint8 [B, C, H, W]."""
        images = self.images[indices]
        return torch.where(mirrored[:, None, None, None], images.flip(3), images)
