"""Training that starts from given weights: the same numbers, fitted to other classes and sizes."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dimr_fast import DiMR
from dimr_fast.checkpoint import CheckpointError, load_checkpoint, load_model, save_model
from dimr_fast.data.arrays import ImageArray
from dimr_fast.data.scaling import LatentScale, PixelScale
from dimr_fast.training import CHECKPOINT, train
from tests.support.image_files import noise, save
from tests.support.models import trained_model, write_checkpoint
from tests.support.training import PlainImages, same_tensors, small_run, train_on_plain_images

CLASSES = "stages.0.class_embeds.weight"
POSITIONS = "stages.{}.input_layer.3.position_embeddings.weight"
STILL = {"learning_rate": 1e-30, "steps": 1}
"""A run whose step changes no weight."""


@pytest.fixture(scope="module")
def model() -> DiMR:
    return trained_model().model


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of 16×16 pixels in six classes, scaled by (100, 50)."""
    folder = tmp_path_factory.mktemp("start") / "model"
    save_model(trained_model(), folder)
    return folder


def stored(run: Path, prefix: str) -> dict[str, Tensor]:
    tensors, _ = load_checkpoint(run / CHECKPOINT, prefix)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def images(folder: Path, classes: int, size: int = 16) -> str:
    for label in range(classes):
        for number in range(4):
            save(folder / f"c{label}" / f"{number}.png", noise(size, size, 10 * label + number))
    return str(folder)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["folder", "checkpoint", "pth", "run"])
def test_weights_and_average_start_from_the_given_ones(
    model: DiMR, start: Path, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "nnet_ema.pth"
    torch.save(model.state_dict(), path)
    sources = {"folder": start, "pth": path, "run": tmp_path}
    sources["checkpoint"] = write_checkpoint(trained_model(), tmp_path / "start.safetensors")
    config = small_run(tmp_path / "run", init=str(sources[kind]), **STILL)
    train_on_plain_images(config)
    expected = {name: value.detach() for name, value in model.state_dict().items()}
    assert same(stored(config.output, "model."), expected)
    assert same(stored(config.output, "ema."), expected)


def test_inputs_are_scaled_as_the_start_was(
    model: DiMR, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_on_plain_images(small_run(tmp_path / "a", init=str(start), **STILL))
    assert load_model(tmp_path / "a" / CHECKPOINT).scale == PixelScale(100.0, 50.0)
    assert "assumed" not in capsys.readouterr().out
    # Published weights do not state it.
    torch.save(model.state_dict(), tmp_path / "nnet.pth")
    train_on_plain_images(small_run(tmp_path / "b", init=str(tmp_path / "nnet.pth"), **STILL))
    assert load_model(tmp_path / "b" / CHECKPOINT).scale == PixelScale(127.5, 127.5)
    assert "assumed that the weights are of pixels scaled to −1..1" in capsys.readouterr().out


def test_other_classes_get_new_embeddings(
    model: DiMR, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = images(tmp_path / "photos", 2)
    train(small_run(tmp_path / "run", init=str(start), data=data, **STILL))
    said = capsys.readouterr().out
    assert "the embeddings of the 2 classes are new, since the weights are of 6" in said
    found, before = stored(tmp_path / "run", "model."), model.state_dict()
    table, old = found.pop(CLASSES), before.pop(CLASSES)
    assert table.shape == (3, old.shape[1])
    assert torch.equal(table[-1], old[-1])  # the null class
    assert not any(torch.equal(row, other) for row in table[:-1] for other in old)
    assert table[:-1].std() == pytest.approx(0.02, rel=0.5)  # as embeddings are initialised
    assert same(found, {name: value.detach() for name, value in before.items()})


def test_positions_are_interpolated_to_another_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Embeddings that are linear in the position of a patch's centre stay so."""

    def linear(branch: int, side: int) -> Tensor:
        centres = (torch.arange(side) + 0.5) / side
        dim = start.model.config.stage_configs[branch].dim
        slopes = torch.linspace(-1, 1, dim)
        rows, columns = centres[:, None, None], centres[None, :, None]
        return (rows * slopes + columns * slopes.flip(0) + slopes**2).flatten(0, 1)

    start = trained_model()
    state = start.model.state_dict()
    for i, branch in enumerate(start.model.config.stage_configs):
        state[POSITIONS.format(i)] = linear(i, branch.max_height)
    start.model.load_state_dict(state)
    save_model(start, tmp_path / "start")
    data = images(tmp_path / "photos", 6, 32)
    config = small_run(
        tmp_path / "run", init=str(tmp_path / "start"), data=data, image_size=32, **STILL
    )
    train(config)
    assert "interpolated the positions of branch 0 from (4, 4) to (8, 8)" in capsys.readouterr().out
    found = stored(tmp_path / "run", "ema.")
    for i, branch in enumerate(start.model.config.stage_configs):
        side = 2 * branch.max_height
        inner = slice(4, side - 4)  # beyond the outer centres there is nothing to interpolate
        square = found[POSITIONS.format(i)].unflatten(0, (side, side))[inner, inner]
        expected = linear(i, side).unflatten(0, (side, side))[inner, inner]
        torch.testing.assert_close(square, expected, rtol=0, atol=1e-5)


def test_a_run_is_resumed_without_the_file_it_started_from(start: Path, tmp_path: Path) -> None:
    other = tmp_path / "moved"
    save_model(load_model(start), other)
    part = small_run(tmp_path / "part", init=str(other), steps=2, decay=0.0)
    train_on_plain_images(part)
    for path in other.iterdir():
        path.unlink()
    train_on_plain_images(dataclasses.replace(part, steps=4), resume=True)
    expected = small_run(tmp_path / "expected", init=str(start), steps=4, decay=0.0)
    train_on_plain_images(expected)
    assert same_tensors(part.output, expected.output)


def test_a_run_is_not_resumed_with_another_start(start: Path, tmp_path: Path) -> None:
    random = small_run(tmp_path / "random", **STILL)
    given = small_run(tmp_path / "given", init=str(start), **STILL)
    for config, other in ((random, str(start)), (given, None), (given, "elsewhere")):
        if not config.output.exists():
            train_on_plain_images(config)
        with pytest.raises(ValueError, match=r"init: got .* for a run that is resumed"):
            train_on_plain_images(dataclasses.replace(config, init=other), resume=True)


class Latents(ImageArray):
    """Images that say that they are latents."""

    def __init__(self) -> None:
        super().__init__(
            torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.arange(8) % 6, "abcdef"
        )
        self.scale = LatentScale()  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "demo"}, r"do not fit the configuration.*; it holds tiny: set preset=tiny"),
        ({"init": "none.pth"}, "none.pth: not a readable .pth file"),
        ({"init": "none/here"}, "none/here: not a readable .pth file"),
    ],
)
def test_unusable_weights_are_named_before_anything_is_written(
    start: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = small_run(tmp_path / "run", **({"init": str(start)} | changes))
    with pytest.raises(CheckpointError, match=message):
        train(config, examples=PlainImages())
    assert not config.output.exists()


def test_weights_of_pixels_are_refused_for_latents(start: Path, tmp_path: Path) -> None:
    config = small_run(tmp_path / "run", init=str(start))
    with pytest.raises(CheckpointError, match="a model of pixels, but the data are latents"):
        train(config, examples=Latents())


def test_weights_of_another_noise_schedule_are_refused(start: Path, tmp_path: Path) -> None:
    config = small_run(tmp_path / "run", init=str(start), schedule="vp-sde", **STILL)
    with pytest.raises(ValueError, match=r"schedule: got vp-sde, .* trained with discrete"):
        train_on_plain_images(config)
    assert not (tmp_path / "run" / CHECKPOINT).exists()


def test_the_scale_of_the_settings_replaces_that_of_the_start(start: Path, tmp_path: Path) -> None:
    config = small_run(tmp_path / "run", init=str(start), pixel_scale=(127.5, 127.5), **STILL)
    train_on_plain_images(config)
    assert load_model(config.output / CHECKPOINT).scale == PixelScale(127.5, 127.5)


def test_images_of_one_colour_are_scaled_as_the_start_was(start: Path, tmp_path: Path) -> None:
    for label in "ab":
        save(tmp_path / "photos" / label / "0.png", np.full((16, 16, 3), 7, np.uint8))
    data = str(tmp_path / "photos")
    train(small_run(tmp_path / "run", init=str(start), data=data, batch_size=2, **STILL))
    with pytest.raises(ValueError, match="one colour"):
        train(small_run(tmp_path / "random", data=data, batch_size=2, **STILL))
