"""The interface of training data."""

from typing import Protocol

from torch import Tensor

from dimr_fast.data.scaling import Scale


class Examples(Protocol):
    """Labelled images or latents to train on, read by index. Picklable, for data loader workers.

    `shape` is the model's input shape, (C, H, W); `labels`, int64 [N] on the CPU, index `classes`.
    """

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def scale(self) -> Scale: ...

    @property
    def shape(self) -> tuple[int, int, int]: ...

    def fingerprint(self) -> str:
        """Return a SHA-256 that identifies the examples independently of their path.

        Nothing is decoded for it.
        """
        ...

    def read(self, indices: Tensor, mirrored: Tensor) -> Tensor:
        """Read the examples at int64 `indices` [B], left-right mirrored where `mirrored`, bool [B].

        Returns uint8 [B, C, H, W] for images, moments [B, 2C, H, W] for latents, on the CPU:
        the input of `scale.to_model`.
        """
        ...
