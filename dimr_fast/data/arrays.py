"""Labelled images that are in memory already."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from dimr_fast.data.scaling import PixelScale


class ImageArray:
    """Images uint8 [N, C, H, W] with int64 labels [N] of the named classes, to train on.

    Pixels are standardised over all of them. Raises ValueError for other dtypes or shapes, no image
    at all, or labels outside the classes.
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
        """SHA-256 of all pixels and labels."""
        digest = hashlib.sha256(self.images.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()

    def read(self, indices: Tensor, mirrored: Tensor) -> Tensor:
        """The images at `indices`, left-right mirrored where `mirrored`: uint8 [B, C, H, W]."""
        images = self.images[indices]
        return torch.where(mirrored[:, None, None, None], images.flip(3), images)
