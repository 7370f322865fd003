"""Fréchet distances of images in memory, to a reference and to held-out images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dimr_fast.evaluation.features import EfficientNetLite0Features, FeatureNetwork
from dimr_fast.evaluation.image_sets import TensorImages
from dimr_fast.evaluation.statistics import FeatureStatistics, compute_statistics


def frechet_to_reference(
    network: FeatureNetwork, images: Tensor, reference: FeatureStatistics
) -> float:
    """Return the Fréchet distance of images, uint8 [N, 3, h, w], to a reference's statistics.

    `reference` comes from the same network. The distance of few images is biased upwards, so only
    distances of equal N are comparable. Raises ValueError for fewer than two images.
    """
    return compute_statistics(network, TensorImages(images, "memory")).distance(reference)


@dataclass(frozen=True)
class FrechetScores:
    """Fréchet distances of samples, training images and noise to the same held-out images.

    Each is computed from `count` images. `training` and `noise` are a lower and an upper point of
    comparison: the distances of `count` training images and of `count` images of uniform noise. The
    distance of few images is biased upwards, so only distances of equal counts are comparable.
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
    samples: Tensor,
    training: Tensor,
    held_out: Tensor,
    seed: int = 0,
) -> FrechetScores:
    """Compute the distances of `samples`, of as many training images and of noise to `held_out`.

    All images are uint8 [N, 3, h, w]. `seed` selects the training images, without replacement, and
    the noise. Raises ValueError for fewer than two samples or held-out images, or fewer training
    images than samples.
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
    reference = compute_statistics(features, TensorImages(held_out, "held out"))
    return FrechetScores(
        recipe=features.recipe,
        count=count,
        held_out_count=len(held_out),
        samples=frechet_to_reference(features, samples, reference),
        training=frechet_to_reference(features, training, reference),
        noise=frechet_to_reference(features, noise, reference),
    )
