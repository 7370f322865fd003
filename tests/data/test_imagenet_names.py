"""The names of ImageNet's classes, and sampling them by name."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch

from dimr_fast import DiMR, cli
from dimr_fast.checkpoint import TrainedModel, save_model
from dimr_fast.data.imagenet import default_classes, imagenet_classes
from dimr_fast.data.scaling import PixelScale
from tests.support.models import randomised
from tests.support.paths import ROOT

PHOTOGRAPHS = {
    22: "bald eagle",
    99: "goose",
    129: "spoonbill",
    305: "dung beetle",
    471: "cannon",
    541: "drum",
    609: "jeep",
    949: "strawberry",
}
"""What one sees on photographs of the package foolbox; the labels are in their file names."""


def test_every_class_has_a_synset_and_a_name_of_its_own() -> None:
    synsets, names = zip(*imagenet_classes(), strict=True)
    assert len(names) == 1000
    assert list(synsets) == sorted(set(synsets))  # labels follow the order of the synsets
    assert all(re.fullmatch(r"n\d{8}", synset) for synset in synsets)
    assert len({name.lower() for name in names}) == 1000
    assert not any(name.isdecimal() or name == "none" for name in names)


def test_labels_are_those_of_photographs_and_of_known_classes() -> None:
    names = default_classes(1000)
    assert {label: names[label] for label in PHOTOGRAPHS} == PHOTOGRAPHS
    known = {0: "tench", 1: "goldfish", 2: "great white shark", 207: "golden retriever"}
    known |= {134: "crane (bird)", 517: "crane (machine)", 999: "toilet tissue"}
    assert {label: names[label] for label in known} == known
    assert default_classes(3) == ("0", "1", "2")


def test_the_table_is_installed_and_names_its_source() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "imagenet_classes.txt" in settings["package-data"]["dimr_fast.data"]
    text = (ROOT / "dimr_fast" / "data" / "imagenet_classes.txt").read_text()
    assert "WordNet 3.0" in text
    assert "Apache-2.0" in text


@pytest.fixture(scope="module")
def model() -> DiMR:
    return randomised(DiMR.from_preset("tiny", num_classes=1001))


@pytest.mark.parametrize("classes", ["names", "numbers", "synsets"])
def test_classes_are_drawn_by_name(model: DiMR, tmp_path: Path, classes: str) -> None:
    lists = {
        "names": default_classes(1000),
        "numbers": tuple(map(str, range(1000))),
        "synsets": tuple(synset for synset, _ in imagenet_classes()),
    }
    folder = tmp_path / "model"
    save_model(TrainedModel(model, lists[classes], PixelScale(127.5, 127.5)), folder)

    def draw(output: str, *names: str) -> bytes:
        words = ["sample", "--checkpoint", str(folder), "--output", str(tmp_path / output)]
        words += ["--steps", "2", "--per-class", "1", "--formats", "npz", "--classes", *names]
        assert cli.main(words) == 0
        return (tmp_path / output / "samples.npz").read_bytes()

    by_name = draw("named", "goldfish", "great white shark", "crane (machine)")
    assert by_name == draw("numbered", "1", "2", "517")
    record = json.loads((tmp_path / "named" / "sample.json").read_text())
    assert record["classes"] == [lists[classes][label] for label in (1, 2, 517)]


def test_an_unknown_name_is_answered_by_similar_ones(
    model: DiMR, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    scale = PixelScale(127.5, 127.5)
    save_model(TrainedModel(model, default_classes(1000), scale), folder)
    words = ["sample", "--checkpoint", str(folder), "--output", str(tmp_path / "out")]
    assert cli.main([*words, "--classes", "gold fish"]) == 2
    assert "classes: got 'gold fish', expected a name (goldfish" in capsys.readouterr().err


def test_a_converted_model_of_1000_classes_has_the_names(
    model: DiMR, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(model.state_dict(), tmp_path / "nnet.pth")
    words = ["convert", "--input", str(tmp_path / "nnet.pth"), "--output", str(tmp_path / "model")]
    assert cli.main(words) == 0
    assert "assumed class names tench, goldfish, great white shark, …" in capsys.readouterr().out
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    assert tuple(stored["classes"]) == default_classes(1000)
