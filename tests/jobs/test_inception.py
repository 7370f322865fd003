"""Scores on the Inception v3 of published FIDs, and the statistics files of references."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dimr_fast.evaluation import evaluate
from dimr_fast.evaluation.features import InceptionFeatures, bare_package
from dimr_fast.evaluation.image_sets import NpzImages
from dimr_fast.evaluation.metrics import inception_score, precision_recall
from dimr_fast.evaluation.real_images import cached_statistics
from dimr_fast.utils.files import file_sha256
from tests.support.evaluation import Colours, small_evaluation
from tests.support.image_files import random_images, write_folder, write_npz


def test_inception_statistics_need_inception(tmp_path: Path) -> None:
    np.savez(tmp_path / "real.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    images = write_folder(random_images(12), tmp_path / "fake")
    job = small_evaluation(tmp_path, tmp_path / "real.npz", images=images)
    with pytest.raises(ValueError, match="Inception statistics without images"):
        evaluate(job, network=Colours())


def test_statistics_alone_give_no_precision_nor_recall(tmp_path: Path) -> None:
    class Wide(InceptionFeatures):
        """The interface of the Inception features without the network."""

        weights_hash = "0"
        packages = ()

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def forward(self, images: Tensor) -> Tensor:
            return images.float().flatten(1).repeat(1, 3)[:, :2048]

        def logits(self, features: Tensor) -> Tensor:
            return features[:, :10]

    images = write_npz(random_images(12), tmp_path / "fake.npz")
    path = tmp_path / "real.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    scores = evaluate(small_evaluation(tmp_path, path, images=images), network=Wide())
    assert (scores.precision, scores.recall) == (None, None)
    assert any("holds no images" in note for note in scores.notes)
    assert scores.recipe["reference"]["distance to"] == "mu and sigma of the file"
    assert file_sha256(path) in scores.recipe["reference"]["fingerprint"]
    for mu, message in ((np.zeros(64), r"mu \(64,\)"), (np.full(2048, np.nan), "not finite")):
        np.savez(path, mu=mu, sigma=np.eye(2048))
        job = small_evaluation(tmp_path, path, images=images, output=tmp_path / "out1")
        with pytest.raises(ValueError, match=message):
            evaluate(job, network=Wide())


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a weights file like the published one, with random weights."""
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
            # Activations keep their scale.
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


def test_inception_end_to_end(tmp_path: Path, inception_weights: Path) -> None:
    images, real = random_images(10) // 2, random_images(10, seed=1)
    mu, sigma = np.linspace(0, 1, 2048), 0.01 * np.eye(2048)
    # As in the ADM suite: mu and sigma beside images replace the statistics of the images.
    reference = write_npz(real, tmp_path / "real.npz", mu=mu, sigma=sigma)
    file = write_npz(images, tmp_path / "fake.npz")
    options: dict[str, Any] = {"images": file, "inception_weights": inception_weights}
    scores = evaluate(small_evaluation(tmp_path, reference, **options))
    # Only a score on the published weights is a FID.
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
