"""A model exported as a Hugging Face Space."""

from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from dimr_fast import cli
from dimr_fast.checkpoint import CheckpointError, load_model, save_model
from dimr_fast.errors import DataUnavailableError
from dimr_fast.export import ExportConfig, export
from dimr_fast.hub import space
from tests.support.models import trained_model, write_checkpoint
from tests.support.web_server import draw, served


@pytest.fixture
def invented_gradio(monkeypatch: pytest.MonkeyPatch, invented_versions: dict[str, str]) -> None:
    invented_versions["gradio"] = "6.1.2"


def metadata_of(folder: Path) -> dict[str, object]:
    _, card, text = (folder / "README.md").read_text().split("---\n", 2)
    assert f"# {folder.name}" in text
    return yaml.safe_load(card)


@pytest.mark.parametrize("saved", [False, True], ids=["checkpoint", "saved model"])
def test_a_space_holds_page_requirements_metadata_and_model(
    tmp_path: Path, invented_gradio: None, saved: bool
) -> None:
    trained = trained_model()
    checkpoint = tmp_path / "saved"
    if saved:
        save_model(trained, checkpoint)
    else:
        checkpoint = write_checkpoint(trained, tmp_path / "checkpoint.safetensors")
    output = tmp_path / "tiles"
    written = export(
        ExportConfig(checkpoint=checkpoint, output=output, space=True, license="apache-2.0")
    )
    assert written == output
    assert {path.name for path in output.iterdir()} == {
        "README.md",
        "app.py",
        "model",
        "requirements.txt",
    }
    card = metadata_of(output)
    assert card["sdk"] == "gradio"
    assert card["sdk_version"] == "6.1.2"
    assert card["license"] == "apache-2.0"
    assert (output / str(card["app_file"])).is_file()
    requirement = Requirement((output / "requirements.txt").read_text().strip())
    assert (requirement.name, requirement.extras) == ("dimr_fast", {"web"})
    assert load_model(output / "model").classes == trained.classes


def test_nothing_is_left_where_a_space_cannot_be_written(
    tmp_path: Path,
    invented_gradio: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    settings = {"checkpoint": tmp_path / "empty", "output": tmp_path / "tiles", "space": True}
    with pytest.raises(CheckpointError, match=r"empty: a folder, expected a checkpoint"):
        export(ExportConfig(**settings))
    real = metadata.version

    def without_gradio(name: str) -> str:
        if name == "gradio":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", without_gradio)
    with pytest.raises(DataUnavailableError, match=r"gradio package not found.*dimr_fast\[web\]"):
        export(ExportConfig(**settings))
    # The page says the same, before it loads a model.
    assert cli.main(["web", "--checkpoint", str(tmp_path / "none")]) == 2
    assert 'pip install "dimr_fast[web]"' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.slow
def test_the_app_of_a_space_draws(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="needs the gradio package")
    checkpoint = write_checkpoint(trained_model(), tmp_path / "checkpoint.safetensors")
    folder = export(ExportConfig(checkpoint=checkpoint, output=tmp_path / "tiles", space=True))
    # The port of a Space may be taken on this machine.
    app = (folder / "app.py").read_text()
    assert "port=7860" in app
    (folder / "app.py").write_text(app.replace("7860", "0").replace("0.0.0.0", "127.0.0.1"))
    settings = ["dpm++2m", 2, 0, 0, 1]
    with served([], folder, command=("app.py",)) as url:
        event, data = draw(url, [["a"], 1, 0, False, *settings, *settings])
    assert event == "complete"
    assert "--checkpoint model --classes a --count 1" in str(data)
    assert space.MODEL == "model"
