"""DiMR on the Hub's mixin: folders and repositories, without a network."""

import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from torch import nn

from dimr_fast import DiMR, DiMRConfig, optimize_for_inference
from dimr_fast.checkpoint import CheckpointError, load_model
from dimr_fast.hub.mixin import canonical
from dimr_fast.utils.tensors import write_tensors
from tests.support.golden import Golden
from tests.support.models import inputs, randomised

NOTES = {
    "classes": ["a", "b", "c", "d", "e", "f"],
    "scale": {"kind": "pixels", "mean": 127.5, "std": 127.5},
    "recipe": {"steps": 10},
    "scores": {"frechet": 12.5},
}


@pytest.fixture
def model() -> DiMR:
    return randomised(DiMR.from_preset("tiny"))


def same_outputs(a: nn.Module, b: nn.Module) -> bool:
    with torch.no_grad():
        return all(torch.equal(x, y) for x, y in zip(a(**inputs()), b(**inputs()), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_predicts_the_same(
    model: DiMR, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.to(dtype).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    loaded = DiMR.from_pretrained(tmp_path)
    assert capsys.readouterr().out == ""
    assert type(loaded) is DiMR
    assert not loaded.training
    assert all(p.requires_grad and p.dtype == dtype for p in loaded.parameters())
    assert same_outputs(loaded.float(), model.float())


@pytest.mark.parametrize("case", ["two_branch_tdln", "three_branch_tdrms"])
def test_a_model_of_a_published_configuration_round_trips(case: str, tmp_path: Path) -> None:
    golden = Golden(case)
    model = DiMR(golden.config)
    model.load_state_dict(golden.under("param/"), strict=True)
    model.save_pretrained(tmp_path)
    loaded = DiMR.from_pretrained(str(tmp_path))
    assert loaded.config == model.config == DiMRConfig.from_published(golden.config)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(golden.under("param/"))
        assert file.metadata() == {"format": "pt"}
    outputs = loaded(golden["in/x"], log_snr=golden["in/time"], y=golden["in/y"])
    expected = model(golden["in/x"], log_snr=golden["in/time"], y=golden["in/y"])
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_a_loaded_model_can_be_copied_trained_and_saved_again(model: DiMR, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = DiMR.from_pretrained(tmp_path)
    assert same_outputs(copy.deepcopy(loaded), model)
    assert same_outputs(pickle.loads(pickle.dumps(loaded)), model)
    assert same_outputs(
        optimize_for_inference(loaded, torch.float32), optimize_for_inference(model, torch.float32)
    )
    loaded.train()
    sum(prediction.square().mean() for prediction in loaded(**inputs())).backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    # The file that it was loaded from is overwritten.
    loaded.save_pretrained(tmp_path)
    assert same_outputs(DiMR.from_pretrained(tmp_path), model)


def test_weights_of_wrapped_models_have_plain_names(model: DiMR, tmp_path: Path) -> None:
    expected = set(model.state_dict())
    torch.compile(model, backend="eager").save_pretrained(tmp_path / "whole")
    model.stages[0] = torch.compile(model.stages[0], backend="eager")
    assert set(model.state_dict()) != expected
    model.save_pretrained(tmp_path / "part")
    for folder in ("whole", "part"):
        assert set(DiMR.from_pretrained(tmp_path / folder).state_dict()) == expected
    doubled = {"module.w": torch.zeros(1), "w": torch.zeros(1)}
    with pytest.raises(ValueError, match="two of the name 'w'"):
        canonical(doubled)


def test_notes_go_into_configuration_and_card(model: DiMR, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "named", config=NOTES)
    written = json.loads((tmp_path / "named" / "config.json").read_text())
    assert written == json.loads(json.dumps(model.config.to_dict())) | NOTES
    card = ModelCard.load(tmp_path / "named" / "README.md")
    assert card.data.library_name == "dimr_fast"
    assert "# named" in card.text
    assert '"frechet": 12.5' in card.text
    assert load_model(tmp_path / "named").classes == tuple(NOTES["classes"])
    with pytest.raises(ValueError, match="config: got 'colour'"):
        model.save_pretrained(tmp_path / "other", config={"colour": "red"})
    assert not (tmp_path / "other").exists()


def test_push_uploads_a_whole_folder(
    model: DiMR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[dict[str, Any]] = []

    class StandIn:
        def __init__(self, token: str | None = None) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, folder_path: Path, **options: Any) -> str:
            files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
            uploads.append({"files": files, **options})
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", StandIn)
    assert model.push_to_hub("tiles", config=NOTES, token="secret") == "https://hub/commit"
    model.save_pretrained(
        tmp_path / "copy", config=NOTES, push_to_hub=True, repo_id="tiles", token="secret"
    )
    assert [upload["repo_id"] for upload in uploads] == ["me/tiles", "me/tiles"]
    for i, (upload, title) in enumerate(zip(uploads, (b"# tiles\n", b"# copy\n"), strict=True)):
        assert set(upload["files"]) == {"config.json", "model.safetensors", "README.md"}
        assert title in upload["files"]["README.md"]
        folder = tmp_path / str(i)
        folder.mkdir()
        for name, data in upload["files"].items():
            (folder / name).write_bytes(data)
        assert same_outputs(load_model(folder).model, model)


def test_a_repository_is_downloaded_without_its_code(
    model: DiMR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path)
    asked: list[tuple[str, dict[str, Any]]] = []

    def stand_in(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
    loaded = DiMR.from_pretrained("me/tiles", revision="v1", token="secret")
    assert same_outputs(loaded, model)
    files = ["config.json", "model.safetensors"]
    assert asked == [("me/tiles", {"allow_patterns": files, "revision": "v1", "token": "secret"})]


def test_a_missing_or_unfitting_model_is_named(
    model: DiMR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(name: str, **_: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError(f"no connection for {name}\nmore")

    with pytest.raises(
        CheckpointError, match=r"/none/here/at: no such folder, and the Hub gave no"
    ):
        DiMR.from_pretrained("/none/here/at")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"me/tiles: no such folder.*\(no connection"):
        DiMR.from_pretrained("me/tiles")
    with pytest.raises(CheckpointError, match=f"{tmp_path}: not a readable checkpoint"):
        DiMR.from_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"{file}: a file, expected a folder"):
        DiMR.from_pretrained(file)
    state = {name: value.int() for name, value in model.state_dict().items()}
    write_tensors(file, state, {})
    with pytest.raises(CheckpointError, match=r"do not fit .*got torch.int32"):
        DiMR.from_pretrained(tmp_path)
    write_tensors(file, model.state_dict() | {"extra": torch.zeros(2)}, {})
    with pytest.raises(CheckpointError, match=r"1 weight does not fit .*extra is not a weight"):
        DiMR.from_pretrained(tmp_path)


def test_the_attention_backend_is_chosen_as_in_diffusers(model: DiMR) -> None:
    def chosen() -> dict[str, str]:
        return {
            module.operator: module.implementation
            for module in model.modules()
            if hasattr(module, "operator")
        }

    assert model.set_implementation("reference").set_attention_backend("native") is model
    assert chosen()["attention"] == "sdpa"
    assert chosen()["td_rms_norm"] == "reference"
    model.set_attention_backend("flash")
    assert chosen()["attention"] == "flash_attn"
    expected = model.set_attention_backend("reference")(**inputs())[-1]
    actual = model.set_attention_backend("sdpa")(**inputs())[-1]
    torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match="backend: got 'sage', expected one of auto"):
        model.set_attention_backend("sage")
