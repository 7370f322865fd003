"""Sampling from a checkpoint as a user does it."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dimr_fast import DiMR
from dimr_fast.checkpoint import (
    CheckpointError,
    TrainedModel,
    load_checkpoint,
    load_model,
    load_published,
    save_checkpoint,
)
from dimr_fast.data.scaling import PixelScale, scale_to_dict
from dimr_fast.inference import InferenceDiMR, optimize_for_inference
from dimr_fast.sampling import SampleConfig, Sampler, sample, sample_images

CLASSES = ("a", "b", "c", "d", "e", "f")


@pytest.fixture
def trained() -> TrainedModel:
    torch.manual_seed(0)
    model = DiMR.from_preset("tiny")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return TrainedModel(model.eval(), CLASSES, PixelScale(100.0, 50.0))


def write(trained: TrainedModel, path: Path) -> None:
    tensors = {f"ema.{name}": value for name, value in trained.model.state_dict().items()}
    metadata = {
        "config": trained.model.config.to_dict(),
        "classes": trained.classes,
        "scale": scale_to_dict(trained.scale),
    }
    save_checkpoint(path, tensors, metadata)


def test_an_image_does_not_depend_on_its_batch(trained: TrainedModel) -> None:
    labels = torch.arange(5)
    sampler = Sampler(steps=4, precision="fp32")
    together = sample_images(trained, labels, sampler)
    apart = sample_images(trained, labels, dataclasses.replace(sampler, batch_size=2))
    last = sample_images(trained, labels[3:], sampler, first=3)
    assert together.dtype == torch.uint8
    assert together.shape == (5, 3, 16, 16)
    # A batch of another size may take another order of summation, never more than a rounding.
    assert (together.int() - apart.int()).abs().max() <= 1
    assert (together[3:].int() - last.int()).abs().max() <= 1
    other = sample_images(trained, labels, dataclasses.replace(sampler, seed=1))
    assert (together.int() - other.int()).abs().float().mean() > 1


def test_sampling_takes_the_stated_number_of_evaluations(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []

    def watched(model: DiMR, dtype: torch.dtype) -> InferenceDiMR:
        optimised = optimize_for_inference(model, dtype)
        optimised.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
        return optimised

    monkeypatch.setattr("dimr_fast.sampling.optimize_for_inference", watched)
    sample_images(trained, torch.arange(3), Sampler(steps=5, guidance=0.4))
    assert batches == [6] * 5
    batches.clear()
    sample_images(trained, torch.arange(3), Sampler(steps=5, guidance=0.0))
    assert batches == [3] * 5


def test_start_noise_stays_within_its_limit(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[torch.Tensor] = []

    def solver(noise_fn: object, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        starts.append(x)
        return x

    monkeypatch.setattr("dimr_fast.sampling.dpm_solver_singlestep", solver)
    sample_images(trained, torch.arange(6), Sampler(noise_limit=2.5))
    sample_images(trained, torch.arange(6), Sampler(noise_limit=math.inf))
    limited, drawn = starts
    assert limited.abs().max() == 2.5
    assert drawn.abs().max() > 3
    assert torch.equal(limited, drawn.clamp(-2.5, 2.5))
    assert abs(drawn.mean().item()) < 0.05
    assert abs(drawn.std().item() - 1) < 0.05


def test_no_images_for_no_labels(trained: TrainedModel) -> None:
    assert sample_images(trained, torch.empty(0, dtype=torch.int64), Sampler()).shape == (
        0,
        3,
        16,
        16,
    )


def test_labels_out_of_range_are_named(trained: TrainedModel) -> None:
    with pytest.raises(ValueError, match=r"labels: got \[7\]"):
        sample_images(trained, torch.tensor([7]), Sampler())
    with pytest.raises(ValueError, match=r"labels: got torch\.float32"):
        sample_images(trained, torch.zeros(2), Sampler())


def test_pixel_scale_inverts_itself() -> None:
    images = torch.arange(256, dtype=torch.uint8)
    scale = PixelScale.of(images)
    values = scale.to_model(images)
    assert abs(values.mean().item()) < 1e-3
    assert abs(values.std().item() - 1) < 1e-3
    assert torch.equal(scale.to_pixels(values), images)
    assert scale.range == pytest.approx((values[0].item(), values[-1].item()))
    assert scale.to_pixels(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_a_grid_from_a_checkpoint(trained: TrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    write(trained, path)
    config = SampleConfig(
        checkpoint=path, output=tmp_path / "out", per_class=2, sampler=Sampler(steps=2)
    )
    grid = sample(config)
    with Image.open(grid) as picture:
        width, height = picture.size
    assert width > 2 * 16
    assert height > 6 * 16
    report = tmp_path / "out" / "sample.json"
    assert json.loads(report.read_text())["sampler"]["steps"] == 2
    with pytest.raises(FileExistsError, match=r"grid\.png exists already"):
        sample(config)
    grid.unlink()
    with pytest.raises(FileExistsError, match=r"sample\.json exists already"):
        sample(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"guidance": math.inf}, "guidance: got inf"),
        ({"guidance": -0.1}, r"guidance: got -0\.1"),
        ({"noise_limit": 0.0}, r"noise_limit: got 0\.0"),
    ],
)
def test_bad_settings_name_the_setting(
    trained: TrainedModel, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write(trained, tmp_path / "c.safetensors")
    sampler, output = Sampler(**change), tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        sample(SampleConfig(checkpoint=tmp_path / "c.safetensors", output=output, sampler=sampler))
    assert not output.exists()


def test_a_checkpoint_gives_back_its_model(trained: TrainedModel, tmp_path: Path) -> None:
    write(trained, tmp_path / "c.safetensors")
    loaded = load_model(tmp_path / "c.safetensors")
    assert loaded.classes == CLASSES
    assert loaded.scale == trained.scale
    assert not loaded.model.training
    for name, value in trained.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)


def test_unusable_checkpoints_are_named(trained: TrainedModel, tmp_path: Path) -> None:
    missing, text, other = tmp_path / "none", tmp_path / "text", tmp_path / "other"
    text.write_text("not a checkpoint")
    save_checkpoint(other, {"weight": torch.zeros(3)}, {"config": {"channels": 1}})
    for path in (missing, text, tmp_path):
        with pytest.raises(CheckpointError, match=f"{path}: not a readable checkpoint"):
            load_model(path)
    with pytest.raises(CheckpointError, match="not a checkpoint of a DiMR model"):
        load_model(other)


def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"weight": torch.ones(3)}, {})
    with pytest.raises(TypeError):
        save_checkpoint(path, {"weight": torch.zeros(3)}, {"value": object()})
    assert torch.equal(load_checkpoint(path)[0]["weight"], torch.ones(3))
    with pytest.raises(OSError, match="none"):
        save_checkpoint(tmp_path / "none" / "c.safetensors", {"weight": torch.ones(3)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("unpickled code ran",)


def test_published_files_load_without_running_their_code(
    trained: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = trained.model.state_dict()
    torch.save(state, tmp_path / "nnet.pth")
    model = DiMR.from_preset("tiny")
    model.load_state_dict(load_published(tmp_path / "nnet.pth"), strict=True)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    torch.save({"weight": _Payload()}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"bad.pth: not a readable .pth file"):
        load_published(tmp_path / "bad.pth")
    assert "ran" not in capsys.readouterr().out
    (tmp_path / "text.pth").write_text("expected a checkpoint, got words")
    with pytest.raises(CheckpointError, match=r"text.pth: not a readable .pth file"):
        load_published(tmp_path / "text.pth")
    torch.save({"state_dict": state}, tmp_path / "nested.pth")
    with pytest.raises(CheckpointError, match=r"holds .*Dict at 'state_dict'"):
        load_published(tmp_path / "nested.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds list"):
        load_published(tmp_path / "list.pth")
