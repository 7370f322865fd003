"""Small training runs, and ways to disturb them at a chosen step."""

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from dimr_fast import DiMR
from dimr_fast.checkpoint import load_checkpoint
from dimr_fast.data.arrays import ImageArray
from dimr_fast.training import CHECKPOINT, TrainConfig, TrainSummary, train

IMAGES = 60


class PlainImages(ImageArray):
    """60 images of 16×16 pixels in six classes, each class of one colour.

    `before_read` is called before each batch is read, with the number of its step, from 1.
    """

    def __init__(self, before_read: Callable[[int], object] = lambda step: None) -> None:
        labels = torch.arange(IMAGES) % 6
        colours = (labels * 40).to(torch.uint8)[:, None, None, None]
        super().__init__(colours.expand(-1, 3, 16, 16).contiguous(), labels, tuple("abcdef"))
        self.before_read, self.reads = before_read, 0

    def read(self, indices: Tensor, mirrored: Tensor) -> Tensor:
        self.reads += 1
        self.before_read(self.reads)
        return super().read(indices, mirrored)


def small_run(output: Path, **changes: Any) -> TrainConfig:
    """Return the settings of a run of 8 steps of the `tiny` preset."""
    values: dict[str, Any] = {
        "preset": "tiny",
        "minutes": None,
        "steps": 8,
        "batch_size": 8,
        "warmup_steps": 2,
        "precision": "fp32",
    }
    return TrainConfig(output=output, **(values | changes))


def train_on_plain_images(
    config: TrainConfig,
    before_read: Callable[[int], object] = lambda step: None,
    **arguments: Any,
) -> TrainSummary:
    """Train on `PlainImages(before_read)`; `arguments` are those of `train`."""
    return train(config, examples=PlainImages(before_read), **arguments)


def same_tensors(a: Path, b: Path) -> bool:
    """Return whether the checkpoints of two runs hold equal tensors."""
    left, _ = load_checkpoint(a / CHECKPOINT)
    right, _ = load_checkpoint(b / CHECKPOINT)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def log_lines(run: Path) -> list[dict[str, float]]:
    """Return the lines of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@contextmanager
def nan_predictions(steps: Collection[int], *, gradients_only: bool = False) -> Iterator[None]:
    """Make the model's predictions NaN at these training steps, counted from 1.

    With `gradients_only` the predictions, and so the loss, stay finite.
    """
    step = 0

    def spoil(module: nn.Module, inputs: Any, predictions: Any) -> Any:
        nonlocal step
        if not isinstance(module, DiMR) or predictions[-1].is_meta:  # meta: FLOPs are counted
            return None
        step += 1
        if step not in steps:
            return None
        if gradients_only:
            predictions[-1].register_hook(lambda gradient: gradient * torch.nan)
            return None
        return [prediction * torch.nan for prediction in predictions]

    hook = register_module_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()
