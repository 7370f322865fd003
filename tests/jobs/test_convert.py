"""Converting published files to safetensors and back: the same model, or an error."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dimr_fast import PRESETS, DiMR, DiMRConfig, cli, convert
from dimr_fast.checkpoint import CheckpointError, load_model, load_published, save_checkpoint
from dimr_fast.config import preset_of
from dimr_fast.convert import ConvertConfig
from dimr_fast.data.scaling import LatentScale, PixelScale
from dimr_fast.utils.tensors import read_tensors
from tests.support.golden import CASES, Golden, relative_error
from tests.support.models import inputs, randomised


@pytest.fixture(scope="module")
def model() -> DiMR:
    return randomised(DiMR.from_preset("tiny"))


@pytest.fixture
def published(model: DiMR, tmp_path: Path) -> Path:
    torch.save(model.state_dict(), tmp_path / "nnet_ema.pth")
    return tmp_path / "nnet_ema.pth"


def same(weights: dict[str, torch.Tensor], model: DiMR) -> bool:
    expected = model.state_dict()
    return weights.keys() == expected.keys() and all(
        torch.equal(weights[name], value) for name, value in expected.items()
    )


def run(source: Path, output: Path, **settings: Any) -> convert.Conversion:
    return convert.convert(ConvertConfig(input=source, output=output, **settings))


def test_a_published_file_becomes_a_folder_and_a_file_again(
    model: DiMR, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(source: Path, output: Path, *options: str) -> str:
        words = ["convert", "--input", str(source), "--output", str(output), *options]
        assert cli.main(words) == 0
        return capsys.readouterr().out

    training = ["--schedule", "vp-sde", "--pixel-scale", "127.5", "127.5"]
    said = command(published, tmp_path / "folder", *training)
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters, tiny" in said
    assert "the same outputs" in said
    assert "assumed class names 0, 1, 2, …" in said
    loaded = load_model(tmp_path / "folder")
    assert same(loaded.model.state_dict(), model)
    assert loaded.classes == ("0", "1", "2", "3", "4", "5")
    assert loaded.scale == PixelScale(127.5, 127.5)

    assert "assumed" not in command(tmp_path / "folder", tmp_path / "sub" / "weights.safetensors")
    assert same(read_tensors(tmp_path / "sub" / "weights.safetensors")[0], model)
    command(tmp_path / "sub" / "weights.safetensors", tmp_path / "again.pth")
    # As the published code reads it.
    state = torch.load(tmp_path / "again.pth", weights_only=True)
    other = DiMR.from_preset("tiny")
    other.load_state_dict(state, strict=True)
    assert same(other.state_dict(), model)
    assert (tmp_path / "again.pth").stat().st_size < 1.1 * published.stat().st_size


@pytest.mark.parametrize("case", CASES)
def test_golden_published_models_keep_their_numbers(case: str, tmp_path: Path) -> None:
    golden = Golden(case)
    torch.save(golden.under("param/"), tmp_path / "nnet.pth")
    with pytest.raises(CheckpointError, match=r"fit none of DiMR-XL/2R.*--config"):
        run(tmp_path / "nnet.pth", tmp_path / "model")
    values = DiMRConfig.from_published(golden.config).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(values))
    said = run(tmp_path / "nnet.pth", tmp_path / "model", config=tmp_path / "config.json")
    assert said.preset is None
    outputs = DiMR.from_pretrained(tmp_path / "model")(
        golden["in/x"], log_snr=golden["in/time"], y=golden["in/y"]
    )
    for i, output in enumerate(outputs):
        assert relative_error(output, golden[f"mixed_time/out/{i}"]) < 1e-5


def test_prefixes_are_removed_and_reported(model: DiMR, tmp_path: Path) -> None:
    state = {f"module._orig_mod.{name}": value for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "nnet.pth")
    said = run(tmp_path / "nnet.pth", tmp_path / "out.safetensors")
    assert said.remarks == ("removed `_orig_mod.`, `module.` from the weights' names",)
    assert same(read_tensors(tmp_path / "out.safetensors")[0], model)


def test_a_training_checkpoint_gives_its_ema_weights(model: DiMR, tmp_path: Path) -> None:
    state = model.state_dict()
    tensors = {f"model.{name}": torch.zeros_like(value) for name, value in state.items()}
    tensors |= {f"ema.{name}": value for name, value in state.items()}
    metadata = {
        "config": model.config.to_dict(),
        "classes": list("abcdef"),
        "scale": {"kind": "latents", "factor": 0.5},
    }
    save_checkpoint(tmp_path / "checkpoint.safetensors", tensors, metadata)
    said = run(tmp_path / "checkpoint.safetensors", tmp_path / "nnet_ema.pth")
    assert "EMA weights" in said.remarks[0]
    assert same(load_published(tmp_path / "nnet_ema.pth"), model)
    size = sum(value.numel() * value.element_size() for value in state.values())
    assert (tmp_path / "nnet_ema.pth").stat().st_size < 1.5 * size
    run(tmp_path / "checkpoint.safetensors", tmp_path / "folder")
    loaded = load_model(tmp_path / "folder")
    assert (loaded.classes, loaded.scale) == (tuple("abcdef"), LatentScale(0.5))


def test_the_number_of_classes_follows_the_weights(tmp_path: Path) -> None:
    model = randomised(DiMR.from_preset("tiny", num_classes=11))
    torch.save(model.state_dict(), tmp_path / "nnet.pth")
    training = {"schedule": "discrete", "pixel_scale": (100.0, 50.0)}
    assert run(tmp_path / "nnet.pth", tmp_path / "folder", **training).preset == "tiny"
    assert DiMR.from_pretrained(tmp_path / "folder").config.num_classes == 11
    assert len(load_model(tmp_path / "folder").classes) == 10


@pytest.mark.parametrize("name", ["DiMR-XL/2R", "DiMR-L/3R"])
def test_published_sizes_are_recognised(name: str) -> None:
    with torch.device("meta"):
        weights = DiMR.from_preset(name).state_dict()
    found = convert.model_of_preset(weights, Path("nnet.pth"))
    assert found.config == PRESETS[name]
    assert preset_of(found.config) == name


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_a_malicious_file_is_refused_and_its_code_not_run(
    model: DiMR, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touched = tmp_path / "touched"
    bad = tmp_path / "bad.pth"
    torch.save({**model.state_dict(), "note": Payload(touched)}, bad)
    arguments = ["convert", "--input", str(bad), "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    assert f"{bad}: not a readable .pth file" in capsys.readouterr().err
    assert not touched.exists()
    assert not (tmp_path / "out").exists()
    # The payload is a working one.
    torch.load(bad, weights_only=False)
    assert touched.exists()


def test_files_of_the_format_before_torch_1_6_are_read(model: DiMR, tmp_path: Path) -> None:
    old = tmp_path / "old.pth"
    torch.save(model.state_dict(), old, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(old)
    run(old, tmp_path / "out.safetensors")
    assert same(read_tensors(tmp_path / "out.safetensors")[0], model)


@pytest.mark.parametrize("name", ["out", "out.pth", "out.safetensors"])
def test_a_file_that_differs_from_its_source_is_not_kept(
    name: str, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The libraries that write the files are made to write another value."""

    def disturbing(write: Callable[..., None]) -> Callable[..., None]:
        def disturbed(weights: dict[str, torch.Tensor], *args: Any, **options: Any) -> None:
            bias = "stages.1.blocks.0.block2.w0.bias"
            write({**weights, bias: weights[bias] + 1e-3}, *args, **options)

        return disturbed

    monkeypatch.setattr(torch, "save", disturbing(torch.save))
    monkeypatch.setattr(safetensors.torch, "save_file", disturbing(safetensors.torch.save_file))
    with pytest.raises(CheckpointError, match=f"{name}: loaded again, it differs from"):
        run(published, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [published.name]


def test_weights_without_finite_predictions_are_refused(model: DiMR, tmp_path: Path) -> None:
    state = {name: value * float("nan") for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "nnet.pth")
    with pytest.raises(CheckpointError, match="not finite"):
        run(tmp_path / "nnet.pth", tmp_path / "out")


def test_bad_settings_and_inputs_are_named(published: Path, model: DiMR, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(model.config.to_dict()))
    (tmp_path / "text.safetensors").write_text("words")
    torch.save({}, tmp_path / "empty.pth")
    other = {"input": published, "output": tmp_path / "out"}
    for error, message, changes in (
        (ValueError, "preset: got 'XXL', expected one of", {"preset": "XXL"}),
        (ValueError, "config: got .* expected None beside preset", {"preset": "tiny"}),
        (CheckpointError, "weights do not fit", {"preset": "demo", "config": None}),
        (
            CheckpointError,
            "not a readable checkpoint.*none.json",
            {"config": tmp_path / "none.json"},
        ),
        (CheckpointError, "not a readable .pth", {"input": tmp_path / "none.pth"}),
        (CheckpointError, "not a readable check", {"input": tmp_path / "text.safetensors"}),
        (CheckpointError, "fit none", {"input": tmp_path / "empty.pth", "config": None}),
        (FileExistsError, "exists already", {"output": published}),
    ):
        settings = {"config": config, **other, **changes}
        with pytest.raises(error, match=message):
            convert.convert(ConvertConfig(**settings))
        assert not (tmp_path / "out").exists()


def test_an_existing_file_is_not_overwritten(published: Path, tmp_path: Path) -> None:
    (tmp_path / "out.pth").write_text("precious")
    with pytest.raises(FileExistsError):
        run(published, tmp_path / "out.pth")
    assert (tmp_path / "out.pth").read_text() == "precious"


def test_a_converted_model_predicts_what_the_source_does(
    model: DiMR, published: Path, tmp_path: Path
) -> None:
    run(published, tmp_path / "folder")
    loaded = DiMR.from_pretrained(tmp_path / "folder")
    with torch.no_grad():
        for a, b in zip(loaded(**inputs()), model(**inputs()), strict=True):
            assert torch.equal(a, b)
