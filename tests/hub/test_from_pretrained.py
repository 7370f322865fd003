"""Options of `from_pretrained`: those of other libraries, and errors for unknown ones."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from dimr_fast import DiMR
from dimr_fast.checkpoint import CheckpointError
from tests.support.models import inputs, randomised


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    randomised(DiMR.from_preset("tiny")).save_pretrained(tmp_path / "all" / "model")
    return tmp_path / "all"


@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
def test_parameters_are_in_the_given_dtype(folder: Path, option: str) -> None:
    options: dict[str, Any] = {option: torch.bfloat16}
    model = DiMR.from_pretrained(folder, subfolder="model", **options)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    expected = DiMR.from_pretrained(folder / "model").to(torch.bfloat16)
    given = inputs() | {"x": inputs()["x"].bfloat16()}
    with torch.no_grad():
        for actual, prediction in zip(model(**given), expected(**given), strict=True):
            assert torch.equal(actual, prediction)


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "meta"},
        {"device_map": torch.device("meta")},
        {"device_map": {"": "meta"}},
        {"map_location": "meta"},
    ],
)
def test_the_model_is_on_the_given_device(folder: Path, options: dict[str, Any]) -> None:
    model = DiMR.from_pretrained(folder / "model", **options)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_subfolder_of_a_repository_is_downloaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def stand_in(name: str, **options: Any) -> str:
        asked.append(options)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
    DiMR.from_pretrained("me/tiles", subfolder="model", cache_dir="cache")
    files = ["model/config.json", "model/model.safetensors"]
    assert asked == [{"allow_patterns": files, "cache_dir": "cache"}]
    with pytest.raises(CheckpointError, match="other: not a readable checkpoint"):
        DiMR.from_pretrained(folder, subfolder="other")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"no_such_option": 1}, TypeError, "^no_such_option: got an unknown option.* dtype"),
        ({"trust_remote_code": True}, TypeError, "^trust_remote_code: got"),
        ({"allow_patterns": "*"}, TypeError, "^allow_patterns: got"),
        ({"dtype": torch.int8}, ValueError, "^dtype: got torch.int8, expected a floating"),
        ({"torch_dtype": "float16"}, ValueError, "^dtype: got 'float16'"),
        (
            {"dtype": torch.float16, "torch_dtype": torch.bfloat16},
            ValueError,
            "^torch_dtype: got it together with dtype",
        ),
        ({"device_map": "auto"}, ValueError, "^device_map: got 'auto', expected one device"),
        ({"device_map": {"stages.0": "cpu"}}, ValueError, "^device_map: got .*stages.0"),
        (
            {"device_map": "cpu", "map_location": "cpu"},
            ValueError,
            "^map_location: got it together with device_map",
        ),
    ],
)
def test_other_options_are_refused(
    folder: Path, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        DiMR.from_pretrained(folder / "model", **options)
