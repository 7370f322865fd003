"""A loss or a gradient that is not finite: the run stops or skips the step, and says why."""

from pathlib import Path

import pytest
import torch

from dimr_fast.checkpoint import load_checkpoint, load_model
from dimr_fast.data.loader import batch_indices
from dimr_fast.training import CHECKPOINT
from dimr_fast.training.loop import MAX_SKIPPED_STEPS, NONFINITE
from tests.support.training import IMAGES, nan_predictions, small_run, train_on_plain_images


def test_a_nan_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    with (
        nan_predictions({3}),
        pytest.raises(FloatingPointError, match=r"loss nan, .* at step 3"),
    ):
        train_on_plain_images(small_run(tmp_path))
    assert all(p.isfinite().all() for p in load_model(tmp_path / CHECKPOINT).model.parameters())


def test_a_nan_gradient_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    """The loss of that step is finite; the update would make every weight NaN."""
    with (
        nan_predictions({3}, gradients_only=True),
        pytest.raises(FloatingPointError, match=r"loss \d.*, gradient norm nan at step 3"),
    ):
        train_on_plain_images(small_run(tmp_path, checkpoint_minutes=1e-9))
    assert load_checkpoint(tmp_path / CHECKPOINT)[1]["step"] == 2
    assert all(p.isfinite().all() for p in load_model(tmp_path / CHECKPOINT).model.parameters())


def test_the_batch_and_the_state_before_a_nan_loss_are_written(tmp_path: Path) -> None:
    with (
        nan_predictions({3}),
        pytest.raises(FloatingPointError, match=str(tmp_path / NONFINITE)),
    ):
        train_on_plain_images(small_run(tmp_path, checkpoint_minutes=1e-9))
    tensors, metadata = load_checkpoint(tmp_path / NONFINITE)
    assert (metadata["step"], metadata["loss"]) == (2, "nan")
    assert tensors["input.x0"].shape == (8, 3, 16, 16)
    assert torch.equal(tensors["input.indices"], batch_indices(IMAGES, 8, 0, 2))
    state, _ = load_checkpoint(tmp_path / CHECKPOINT)
    assert all(torch.equal(tensors[name], state[name]) for name in state)


def test_nonfinite_steps_can_be_skipped(tmp_path: Path) -> None:
    with nan_predictions({3, 5}):
        summary = train_on_plain_images(small_run(tmp_path, nonfinite="skip"))
    assert summary.steps == 8
    tensors, _ = load_checkpoint(tmp_path / CHECKPOINT)
    assert tensors["losses"].isnan().nonzero().flatten().tolist() == [2, 4]
    assert all(p.isfinite().all() for p in load_model(tmp_path / CHECKPOINT).model.parameters())
    assert next(v for name, v in tensors.items() if name.startswith("optimizer.step")) == 6


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    message = f"at step 13, the {MAX_SKIPPED_STEPS}th in a row"
    with nan_predictions(range(4, 99)), pytest.raises(FloatingPointError, match=message):
        train_on_plain_images(small_run(tmp_path, steps=30, nonfinite="skip"))


def test_a_batch_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    def block(step: int) -> None:
        (tmp_path / NONFINITE).mkdir(exist_ok=True)

    with (
        nan_predictions({3}),
        pytest.raises(FloatingPointError, match=r"loss nan, .* could not be written \("),
    ):
        train_on_plain_images(small_run(tmp_path), block)
