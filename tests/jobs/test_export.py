"""Exporting a trained model to a folder to share."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dimr_fast import DiMR, cli
from dimr_fast.checkpoint import (
    CheckpointError,
    TrainedModel,
    load_model,
    save_checkpoint,
    save_model,
)
from dimr_fast.data.scaling import PixelScale, scale_to_dict
from dimr_fast.export import ExportConfig, export
from tests.support.models import randomised

CLASSES = ("sea", "coast", "ice", "sand", "wood", "town")
SCORES = {"recipe": "Fréchet distance on EfficientNet-Lite0, 1536 images", "samples": 176.25}


@pytest.fixture(scope="module")
def trained() -> TrainedModel:
    return TrainedModel(randomised(DiMR.from_preset("tiny")), CLASSES, PixelScale(71.5, 48.25))


@pytest.fixture
def folder(trained: TrainedModel, tmp_path: Path) -> Path:
    save_model(trained, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run(trained: TrainedModel, tmp_path: Path) -> Path:
    """Return the folder of a run whose EMA weights differ from its last ones."""
    folder = tmp_path / "run"
    folder.mkdir()
    state = trained.model.state_dict()
    tensors = {f"model.{name}": torch.zeros_like(value) for name, value in state.items()}
    tensors |= {f"ema.{name}": value for name, value in state.items()}
    metadata = {
        "config": trained.model.config.to_dict(),
        "classes": CLASSES,
        "scale": scale_to_dict(trained.scale),
        "recipe": {"learning_rate": 0.125},
        "step": 77,
    }
    save_checkpoint(folder / "checkpoint.safetensors", tensors, metadata)
    return folder


def test_export_writes_the_ema_model_and_the_facts_of_the_run(
    trained: TrainedModel, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"learning_rate": 0.25, "output": "/home/me/run", "data": "/home/me a/my photos"}
    record = {"config": settings, "result": {"steps": 8}}
    (run / "train.json").write_text(json.dumps(record))
    (run / "loss.png").write_bytes(b"curve")
    sampled = {"sampling": {"checkpoint": "/home/me/run/checkpoint.safetensors", "steps": 25}}
    said = {"reference": ["/home/me/real (png)", "files /home/me/real 12ab", "https://a.b/c/d"]}
    (run / "scores.json").write_text(json.dumps(SCORES | sampled | said))
    output = tmp_path / "shared"
    arguments = ["export", "--checkpoint", run / "checkpoint.safetensors", "--output", output]
    arguments += ["--scores", run / "scores.json", "--license", "apache-2.0"]
    assert cli.main([str(argument) for argument in arguments]) == 0
    assert str(output) in capsys.readouterr().out
    loaded = load_model(output)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)
    written = json.loads((output / "config.json").read_text())
    settings = {"learning_rate": 0.25, "data": "my photos"}
    assert written["recipe"] == {"config": settings, "result": {"steps": 8}}
    said = {"reference": ["real (png)", "files real 12ab", "https://a.b/c/d"]}
    assert written["scores"] == SCORES | {"sampling": {"steps": 25}} | said
    card = (output / "README.md").read_text()
    assert "![loss](loss.png)" in card
    assert "/home/me" not in card
    assert cli.main([str(argument) for argument in arguments]) == 2
    assert "exists already" in capsys.readouterr().err


def test_export_without_a_report_reads_the_checkpoint(run: Path, tmp_path: Path) -> None:
    export(ExportConfig(checkpoint=run / "checkpoint.safetensors", output=tmp_path / "shared"))
    written = json.loads((tmp_path / "shared" / "config.json").read_text())
    assert written["recipe"] == {"recipe": {"learning_rate": 0.125}, "step": 77}


def test_export_refuses_before_it_writes(run: Path, folder: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoint.safetensors"
    (run / "bad.json").write_text("[1]")
    output = tmp_path / "shared"
    for error, message, changes in (
        (CheckpointError, "expected a checkpoint of training", {"checkpoint": folder}),
        (CheckpointError, "not a readable checkpoint", {"checkpoint": run / "none"}),
        (ValueError, "bad.json: got list", {"scores": run / "bad.json"}),
        (OSError, "none.json", {"scores": run / "none.json"}),
        (ValueError, "pictures: got .*missing: .*none.png", {"pictures": (run / "none.png",)}),
    ):
        values: dict[str, Any] = {"checkpoint": checkpoint, "output": output, **changes}
        with pytest.raises(error, match=message):
            export(ExportConfig(**values))
        assert not output.exists()
