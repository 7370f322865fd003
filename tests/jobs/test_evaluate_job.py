"""Scoring as a user does it: what is read, what is said, what is kept and what is refused."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dimr_fast import cli
from dimr_fast.data.scaling import LatentScale
from dimr_fast.data.tiles import Tiles
from dimr_fast.evaluation import EvaluateConfig, Scores, evaluate, frechet_to_reference
from dimr_fast.evaluation import job as evaluation
from dimr_fast.evaluation import real_images as references
from dimr_fast.evaluation.features import InceptionFeatures, bare_package
from dimr_fast.evaluation.image_sets import FolderImages, NpzImages, TensorImages
from dimr_fast.evaluation.metrics import inception_score, precision_recall
from dimr_fast.evaluation.real_images import cached_statistics, user_cache
from dimr_fast.evaluation.statistics import compute_statistics
from dimr_fast.sampling import Sampler, balanced_labels, sample_images
from dimr_fast.utils.files import file_sha256
from tests.support.image_files import drawn, read, write_folder, write_npz
from tests.support.models import Doubling, trained_model, write_checkpoint


class Colours(torch.nn.Module):
    """A feature network that costs nothing: the mean and deviation of each colour."""

    name = "colours"
    input_size = 16
    resize = "none"
    weights_hash = "0"
    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        Colours.calls += 1
        pixels = images.float().flatten(2)
        return torch.cat([pixels.mean(2), pixels.std(2)], 1)


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "EfficientNetLite0Features", Colours)
    Colours.calls = 0


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return write_folder(drawn(20, seed=1), tmp_path / "real")


def config(tmp_path: Path, reference: Path | str, **changes: Any) -> EvaluateConfig:
    values: dict[str, Any] = {
        "reference": str(reference),
        "output": tmp_path / "out",
        "cache": tmp_path / "cache",
        "device": "cpu",
    }
    return EvaluateConfig(**(values | changes))


def numbers(scores: Scores) -> tuple[float, float | None, float | None]:
    return scores.distance, scores.precision, scores.recall


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(trained_model(), tmp_path / "checkpoint.safetensors")


@pytest.mark.usefixtures("colours")
def test_a_checkpoint_a_folder_and_an_npz_of_the_same_images_score_the_same(
    tmp_path: Path, reference: Path, checkpoint: Path
) -> None:
    sampler = Sampler(steps=2, batch_size=8, precision="fp32")
    options: dict[str, Any] = {"checkpoint": checkpoint, "count": 14, "sampler": sampler}
    scores = evaluate(config(tmp_path, reference, **options))
    assert scores.recipe["images"]["labels"] == "6 classes, 2 to 3 images each"
    sampling = scores.recipe["sampling"]
    assert (sampling["steps"], sampling["seed"], sampling["precision"]) == (2, 0, "fp32")
    assert sampling["guidance"] == sampler.guidance

    trained = evaluation.load_model(checkpoint)
    images = sample_images(trained, balanced_labels(14, 6), sampler)
    folder = write_folder(images, tmp_path / "folder")
    again = config(tmp_path, reference, images=folder, output=tmp_path / "out1")
    assert numbers(evaluate(again)) == pytest.approx(numbers(scores), rel=1e-9)
    npz = write_npz(images, tmp_path / "images.npz")
    again = config(tmp_path, reference, images=npz, output=tmp_path / "out2")
    assert numbers(evaluate(again)) == pytest.approx(numbers(scores), rel=1e-9)


@pytest.mark.usefixtures("colours")
def test_latents_are_decoded(
    tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dimr_fast.data.autoencoder.Autoencoder", Doubling)
    latents = dataclasses.replace(trained_model(), scale=LatentScale())
    path = write_checkpoint(latents, tmp_path / "latents.safetensors")
    sampler = Sampler(steps=2, precision="fp32")
    options: dict[str, Any] = {"checkpoint": path, "count": 10, "sampler": sampler}
    scores = evaluate(config(tmp_path, reference, autoencoder="the autoencoder", **options))
    assert scores.recipe["images"]["size"] == "32x32"
    assert scores.recipe["sampling"]["autoencoder"] == "the autoencoder"
    with pytest.raises(ValueError, match="autoencoder: got None, expected an AutoencoderKL"):
        evaluate(config(tmp_path, reference, output=tmp_path / "out1", **options))


@pytest.mark.usefixtures("colours")
def test_the_whole_recipe_is_said_and_written(
    tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(drawn(12), tmp_path / "fake" / "images")
    said = {"sampler": {"steps": 33, "guidance": 0.4}, "labels": "six of one class"}
    (tmp_path / "fake" / "sample.json").write_text(json.dumps(said))
    arguments = ["--images", folder, "--reference", reference, "--cache", tmp_path / "cache"]
    arguments += ["--output", tmp_path / "out"]
    assert cli.main(["evaluate", *map(str, arguments)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Fréchet distance on colours: ")
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


@pytest.mark.usefixtures("colours")
def test_images_of_another_size_are_noted(tmp_path: Path, reference: Path) -> None:
    folder = write_folder(drawn(12, size=8), tmp_path / "fake")
    scores = evaluate(config(tmp_path, reference, images=folder))
    assert any("differ in size" in note for note in scores.notes)
    assert any("the balance of labels is unknown" in note for note in scores.notes)
    assert scores.recipe["sampling"].startswith("unknown")


@pytest.mark.usefixtures("colours")
def test_tiles_are_cut_to_the_size_of_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tiles(size: int) -> Tiles:
        images, labels = drawn(12, size=size), torch.arange(12) % 6
        corners = torch.zeros(12, 2, dtype=torch.int64)
        return Tiles(images[:0], labels[:0], corners[:0], images, labels, corners)

    monkeypatch.setattr(references, "load_tiles", tiles)
    folder = write_folder(drawn(12, size=64), tmp_path / "fake")
    scores = evaluate(config(tmp_path, "tiles", images=folder))
    assert scores.distance < 1e-9
    found = scores.recipe["reference"]
    assert (found["size"], found["count"]) == ("64x64", 12)
    assert found["labels"] == "6 classes, 2 images each"
    assert "satellite tiles" in found["source"]
    with pytest.raises(ValueError, match="expected square ones"):
        references.Reference.open("tiles", (8, 16))


@pytest.mark.usefixtures("colours")
def test_a_reference_is_computed_once(tmp_path: Path, reference: Path) -> None:
    network: Any = Colours()
    images, cache = FolderImages(reference), tmp_path / "cache"
    first = cached_statistics(network, images, cache)
    calls = Colours.calls
    second = cached_statistics(network, FolderImages(reference), cache)
    assert (first.cached, second.cached, Colours.calls) == (False, True, calls)
    for name in ("mean", "factor", "features"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.features.shape == (20, 6)
    assert frechet_to_reference(network, read(images), second) < 1e-9

    other: Any = Colours()
    other.weights_hash = "1"
    assert not cached_statistics(other, images, cache).cached
    assert len(list(cache.iterdir())) == 2


def damaged(path: Path) -> Iterator[None]:
    """One way after the other to spoil an entry of the cache."""
    whole, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(whole[: len(whole) // 2])
    yield
    flipped = bytearray(whole)
    flipped[-5] ^= 64
    path.write_bytes(flipped)
    yield
    path.write_text("something else")
    yield
    save_file(tensors, path, metadata={"key": "foreign", "hash": "0"})
    yield


def test_a_damaged_or_foreign_entry_is_computed_anew(tmp_path: Path) -> None:
    network: Any = Colours()
    images, cache = TensorImages(drawn(12), ""), tmp_path / "cache"
    first = cached_statistics(network, images, cache)
    (entry,) = cache.iterdir()
    spoilt = 0
    for _ in damaged(entry):
        spoilt += 1
        again = cached_statistics(network, images, cache)
        assert not again.cached
        assert torch.equal(again.factor, first.factor)
        assert cached_statistics(network, images, cache).cached
    assert spoilt == 4
    assert list(cache.iterdir()) == [entry]


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "dimr_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache().is_relative_to(tmp_path)
    assert user_cache().name == "dimr_fast"


def test_few_features_are_kept_of_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dimr_fast.evaluation.statistics.MAX_FEATURES", 5)
    images, network = drawn(23), Colours()
    found = compute_statistics(network, TensorImages(images, ""), batch_size=4)
    assert torch.equal(found.features, network(images[[0, 4, 9, 13, 18]]))
    assert found.mean.double() == pytest.approx(network(images).double().mean(0))


def bad_folder(tmp_path: Path) -> Path:
    return write_folder(drawn(12), tmp_path / "fake")


def truncated(tmp_path: Path) -> Path:
    folder = bad_folder(tmp_path)
    for name in ("0003.png", "0007.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-30])
    return folder


def mixed(tmp_path: Path) -> Path:
    folder = bad_folder(tmp_path)
    Image.new("RGB", (40, 20)).save(folder / "grid.png")
    return folder


def empty(tmp_path: Path) -> Path:
    (tmp_path / "fake").mkdir()
    return tmp_path / "fake"


def floats(tmp_path: Path) -> Path:
    np.savez(tmp_path / "fake.npz", arr_0=np.zeros((12, 16, 16, 3), np.float32))
    return tmp_path / "fake.npz"


def other_arrays(tmp_path: Path) -> Path:
    np.savez(tmp_path / "fake.npz", images=np.zeros((12, 16, 16, 3), np.uint8))
    return tmp_path / "fake.npz"


def no_npz(tmp_path: Path) -> Path:
    (tmp_path / "fake.npz").write_text("text")
    return tmp_path / "fake.npz"


def few(tmp_path: Path) -> Path:
    return write_folder(drawn(9), tmp_path / "fake")


@pytest.mark.usefixtures("colours")
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (truncated, r"images: got 2 of 12 files in .*cannot be read, first .*0003\.png"),
        (mixed, r"several sizes in .*: 12 of 16x16, 1 of 40x20, such as .*grid\.png"),
        (empty, r"images: got .*fake without images, expected some of \.avif"),
        (floats, r"images: got arr_0 of float32 \(12, 16, 16, 3\)"),
        (other_arrays, r"images: got .* with images, expected arr_0"),
        (no_npz, r"images: got .*fake\.npz, expected an \.npz file"),
        (few, "images: got 9 images, expected 10 or more"),
        (lambda path: path / "missing", r"images: got .*missing, expected a folder"),
    ],
)
def test_unusable_images_are_named_before_any_work(
    tmp_path: Path, reference: Path, images: Any, message: str
) -> None:
    path = images(tmp_path)
    with pytest.raises(ValueError, match=message):
        evaluate(config(tmp_path, reference, images=path))
    with pytest.raises(ValueError, match=message.replace("images: got 9", "reference: got 9")):
        evaluate(config(tmp_path, path, images=reference))
    assert not (tmp_path / "out").exists()
    assert Colours.calls == 0


@pytest.mark.usefixtures("colours")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "images, checkpoint: got 0 of them, expected one"),
        ({"images": "fake", "checkpoint": "x"}, "images, checkpoint: got 2 of them"),
        ({"checkpoint": "x", "count": 9}, "count: got 9, expected 10 or more"),
        ({"images": "fake", "sampler": Sampler(steps=0)}, "steps: got 0"),
        ({"images": "fake", "inception_weights": "missing"}, "inception_weights: got .*https://"),
    ],
)
def test_bad_settings_name_the_setting(
    tmp_path: Path, reference: Path, changes: dict[str, Any], message: str
) -> None:
    bad_folder(tmp_path)
    paths = {n: tmp_path / v if isinstance(v, str) else v for n, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        evaluate(config(tmp_path, reference, **paths))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("colours")
def test_scores_that_cannot_be_written_are_said(
    tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, values: object) -> None:
        raise OSError(f"{path}: no space left")

    monkeypatch.setattr("dimr_fast.evaluation.job.write_json", full)
    with pytest.raises(OSError, match=r"no space left; the scores are\nFréchet distance on .*: \d"):
        evaluate(config(tmp_path, reference, images=bad_folder(tmp_path)))


@pytest.fixture(params=["tf32", "none"])
def chosen(request: pytest.FixtureRequest) -> Iterator[str]:
    """How a user has let convolutions compute."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = request.param
    yield request.param
    torch.backends.cudnn.conv.fp32_precision = before


def test_scores_are_of_exact_convolutions_whatever_the_user_has_chosen(chosen: str) -> None:
    class Network(Colours):
        def forward(self, images: Tensor) -> Tensor:
            seen.add(torch.backends.cudnn.conv.fp32_precision)
            return super().forward(images)

    seen: set[str] = set()
    compute_statistics(Network(), TensorImages(drawn(4), ""))
    assert seen == {"ieee"}
    assert torch.backends.cudnn.conv.fp32_precision == chosen


@pytest.mark.usefixtures("colours")
def test_a_cache_that_cannot_be_written_is_said_before_any_work(
    tmp_path: Path, reference: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    images = bad_folder(tmp_path)
    with pytest.raises(OSError, match="cache"):
        evaluate(config(tmp_path, reference, images=images))
    assert Colours.calls == 0


@pytest.mark.usefixtures("colours")
def test_a_cache_on_a_full_disk_is_an_error_of_the_system(
    tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no traceback of the library that writes it."""

    def full(*args: Any, **metadata: Any) -> None:
        raise SafetensorError("No space left on device")

    images = bad_folder(tmp_path)
    monkeypatch.setattr("dimr_fast.utils.tensors.save_file", full)
    with pytest.raises(OSError, match=r"cache.*\.safetensors: No space left on device"):
        evaluate(config(tmp_path, reference, images=images))


@pytest.mark.usefixtures("colours")
def test_inception_statistics_need_inception(tmp_path: Path) -> None:
    np.savez(tmp_path / "real.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    images = bad_folder(tmp_path)
    with pytest.raises(ValueError, match="Inception statistics without images"):
        evaluate(config(tmp_path, tmp_path / "real.npz", images=images))


def test_statistics_alone_give_no_precision_nor_recall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wide(InceptionFeatures):
        """The same features without the network."""

        weights_hash = "0"

        def __init__(self, weights: Path) -> None:
            torch.nn.Module.__init__(self)

        def forward(self, images: Tensor) -> Tensor:
            return images.float().flatten(1).repeat(1, 3)[:, :2048]

        def logits(self, features: Tensor) -> Tensor:
            return features[:, :10]

    monkeypatch.setattr(evaluation, "InceptionFeatures", Wide)
    monkeypatch.setattr(references, "InceptionFeatures", Wide)
    # The package whose network it stands for need not be installed.
    monkeypatch.setattr(evaluation.metadata, "version", lambda name: "0")
    images = write_npz(drawn(12), tmp_path / "fake.npz")
    options: dict[str, Any] = {"images": images, "inception_weights": images}
    path = tmp_path / "real.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    scores = evaluate(config(tmp_path, path, **options))
    assert (scores.precision, scores.recall) == (None, None)
    assert any("holds no images" in note for note in scores.notes)
    assert scores.recipe["reference"]["distance to"] == "mu and sigma of the file"
    assert file_sha256(path) in scores.recipe["reference"]["fingerprint"]
    for mu, message in ((np.zeros(64), r"mu \(64,\)"), (np.full(2048, np.nan), "not finite")):
        np.savez(path, mu=mu, sigma=np.eye(2048))
        with pytest.raises(ValueError, match=message):
            evaluate(config(tmp_path, path, **options, output=tmp_path / "out1"))


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the published one is, but random."""
    try:
        with bare_package("torch_fidelity"):
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError:
        pytest.skip("needs torch-fidelity (pip install --no-deps torch-fidelity)")

    class Untrained(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            pass

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    network = Untrained("inception-v3-compat", ["2048"], str(path))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            # Keeps what passes through of the same size.
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


def test_inception_end_to_end(tmp_path: Path, inception_weights: Path) -> None:
    images, real = drawn(10) // 2, drawn(10, seed=1)
    mu, sigma = np.linspace(0, 1, 2048), 0.01 * np.eye(2048)
    # As the ADM suite has it: what it gives beside images takes the place of their statistics.
    reference = write_npz(real, tmp_path / "real.npz", mu=mu, sigma=sigma)
    file = write_npz(images, tmp_path / "fake.npz")
    options: dict[str, Any] = {"images": file, "inception_weights": inception_weights}
    scores = evaluate(config(tmp_path, reference, **options))
    # A score on any other weights is no FID.
    assert scores.metric == "Fréchet distance on Inception v3"
    assert any("not the published ones" in note for note in scores.notes)
    assert "torch-fidelity" in scores.recipe["versions"]

    network = InceptionFeatures(inception_weights)
    features = network(images).double()
    assert features.shape == (10, 2048)
    deviations = torch.linalg.svdvals(features - features.mean(0)) / 3
    shift = (features.mean(0) - torch.from_numpy(mu)).square().sum()
    # One of the two covariances is a multiple of the identity: standard deviations 0.1.
    expected = shift + deviations.square().sum() + 20.48 - 0.2 * deviations.sum()
    assert scores.distance == pytest.approx(float(expected), rel=1e-6)
    logits = network.logits(features.float())
    assert logits.shape == (10, 1008)
    assert scores.inception_score == pytest.approx(inception_score(logits), rel=1e-5)
    assert scores.inception_score[0] >= 1
    cached = cached_statistics(network, NpzImages(reference), tmp_path / "cache")
    assert cached.cached
    assert (scores.precision, scores.recall) == precision_recall(features.float(), cached.features)


def test_inception_weights_of_another_kind_are_refused(
    tmp_path: Path, inception_weights: Path
) -> None:
    for name, value in (("a", {"x": torch.zeros(1)}), ("b", Path("not a tensor"))):
        torch.save(value, tmp_path / name)
        with pytest.raises(ValueError, match=r"inception_weights: got .*, expected the state dict"):
            InceptionFeatures(tmp_path / name)
    published = dataclasses.make_dataclass("Published", ["weights_hash"])("6726825d" + "0" * 56)
    assert InceptionFeatures.published.fget(published)  # type: ignore[attr-defined]
