"""How a converted model was trained is part of it: schedule, scale, settings of sampling."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from dimr_fast import DiMR, cli
from dimr_fast.checkpoint import CheckpointError, load_model, published_training, save_model
from dimr_fast.config import PRESETS
from dimr_fast.convert import Conversion, ConvertConfig, convert
from dimr_fast.data.scaling import LatentScale
from dimr_fast.sampling import SamplerConfig
from tests.support.models import randomised, trained_model, write_checkpoint

CPU = torch.device("cpu")


def write_weights(model: DiMR, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "nnet.pth")
    return folder / "nnet.pth"


def converted(source: Path, output: Path, config: Path | None = None) -> Conversion:
    return convert(ConvertConfig(input=source, output=output, config=config))


def test_a_published_model_of_latents_is_sampled_as_published(tmp_path: Path) -> None:
    model = randomised(DiMR.from_preset("tiny", channels=4))
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    source = write_weights(model, tmp_path)
    said = converted(source, tmp_path / "folder", tmp_path / "config.json")
    assert "the noise schedule discrete and published sampling" in str(said)
    trained = load_model(tmp_path / "folder")
    assert (trained.schedule, trained.scale) == ("discrete", LatentScale())
    recipe = SamplerConfig().recipe(trained, CPU)
    assert recipe["solver"] == "DPM-Solver++ single-step, order 3"
    expected = {"steps": 250, "guidance": 0.4, "spacing": "time", "guidance_power": None}
    expected |= {"clip": "none", "noise_limit": "none", "schedule": "discrete"}
    assert {name: recipe[name] for name in expected} == expected
    assert "as published" in (tmp_path / "folder" / "README.md").read_text()
    again = converted(tmp_path / "folder", tmp_path / "again")
    assert not again.remarks
    assert load_model(tmp_path / "again").defaults == "published"


@pytest.mark.parametrize("name", ["DiMR-M/3R", "DiMR-L/3R"])
def test_published_pixel_models_have_the_schedule_of_their_training(name: str) -> None:
    notes = published_training(PRESETS[name])
    assert notes.pop("scale") == {"kind": "pixels", "mean": 127.5, "std": 127.5}
    assert notes == {"schedule": "vp-sde", "sampling_defaults": "published"}
    trained = dataclasses.replace(trained_model(), schedule="vp-sde", defaults="published")
    resolved = SamplerConfig().resolved(trained, CPU)
    # Their labels were never dropped, and they were scored without guidance.
    assert (resolved.steps, resolved.guidance) == (250, 0.0)
    assert (resolved.clip, resolved.noise_limit) == (False, math.inf)


def test_an_unknown_pixel_model_is_not_sampled_until_its_training_is_stated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_weights(randomised(DiMR.from_preset("tiny")), tmp_path)
    assert "no images can be drawn" in str(converted(source, tmp_path / "folder"))
    assert "schedule is not recorded" in (tmp_path / "folder" / "README.md").read_text()
    sampling = ["sample", "--output", str(tmp_path / "out"), "--per-class", "1", "--steps", "2"]
    assert cli.main([*sampling, "--checkpoint", str(tmp_path / "folder")]) == 2
    error = capsys.readouterr().err
    assert "its noise schedule is not recorded" in error
    assert not (tmp_path / "out").exists()
    stated = "--schedule NAME --pixel-scale MEAN STD"
    assert f"dimr-fast convert --input {tmp_path / 'folder'} --output FOLDER {stated}" in error

    options = ["--schedule", "vp-sde", "--pixel-scale", "127.5", "127.5"]
    words = ["convert", "--input", str(tmp_path / "folder"), "--output", str(tmp_path / "stated")]
    assert cli.main([*words, *options]) == 0
    assert cli.main([*sampling, "--checkpoint", str(tmp_path / "stated")]) == 0
    report = json.loads((tmp_path / "out" / "sample.json").read_text())
    assert report["sampler"]["schedule"] == "vp-sde"
    assert report["sampler"]["clip"] == "each predicted image, to the pixels' range"


def test_a_training_run_keeps_its_schedule(tmp_path: Path) -> None:
    trained = trained_model()
    # As earlier versions wrote it, without a schedule.
    write_checkpoint(trained, tmp_path / "c.safetensors")
    assert load_model(tmp_path / "c.safetensors").schedule == "discrete"
    said = converted(tmp_path / "c.safetensors", tmp_path / "folder")
    assert "assumed" not in str(said)
    loaded = load_model(tmp_path / "folder")
    assert (loaded.schedule, loaded.defaults, loaded.scale) == ("discrete", None, trained.scale)


@pytest.mark.parametrize(
    ("notes", "schedule"),
    [
        ({"recipe": {"steps": 10}}, "discrete"),
        ({"scale": {"kind": "latents", "factor": 0.5}}, "discrete"),
        ({}, None),
    ],
)
def test_folders_of_earlier_versions(
    tmp_path: Path, notes: dict[str, object], schedule: str | None
) -> None:
    """Runs and latents had one schedule; a converted pixel model may have had another."""
    trained = trained_model()
    scale = {"kind": "pixels", "mean": 127.5, "std": 127.5}
    facts = {"classes": list("abcdef"), "scale": scale, **notes}
    trained.model.save_pretrained(tmp_path / "model", config=facts)
    if schedule is None:
        with pytest.raises(CheckpointError, match=r"model: its noise schedule is not recorded"):
            load_model(tmp_path / "model")
    else:
        assert load_model(tmp_path / "model").schedule == schedule


@pytest.mark.parametrize(("name", "value"), [("schedule", "cosine"), ("sampling_defaults", "best")])
def test_an_unknown_name_in_a_folder_is_refused(tmp_path: Path, name: str, value: str) -> None:
    save_model(trained_model(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(CheckpointError, match=f"{name}: got '{value}', expected"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "cosine"}, "schedule: got 'cosine', expected discrete or vp-sde"),
        ({"schedule": "discrete", "output": Path("a.pth")}, "schedule: .* for a folder"),
        ({"pixel_scale": (0.0, 1.0), "output": Path("a.pth")}, "pixel_scale: .* for a folder"),
        ({"pixel_scale": (0.0, 0.0)}, r"pixel_scale: got \(0\.0, 0\.0\)"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {"input": tmp_path / "x.pth", "output": tmp_path / "out"}
    with pytest.raises(ValueError, match=message):
        convert(ConvertConfig(**{**settings, **change}))  # type: ignore[arg-type]
