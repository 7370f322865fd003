"""What is known of a set of images by their features."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dimr_fast.data.image_sets import ImageSet
from dimr_fast.features import FeatureNetwork
from dimr_fast.metrics import FeatureStatistics, covariance_factor, frechet_from_factors

KEPT = 50_000
"""Features kept of a set, for scores that need more than mean and covariance."""


@dataclass(frozen=True)
class FeatureSummary:
    """Mean [D] and a factor F [D, any] of the unbiased covariance F Fᵀ in fp64; some features.

    Those kept are fp32 [≤ KEPT, D]; `cached` says whether it was read from the cache.
    """

    mean: Tensor
    factor: Tensor
    features: Tensor
    cached: bool = False

    def distance(self, other: "FeatureSummary") -> float:
        """The Fréchet distance of two sets of images, summarised on the same network."""
        return frechet_from_factors(self.mean, self.factor, other.mean, other.factor)


def summarize(
    network: FeatureNetwork,
    images: ImageSet,
    progress: Callable[[int], object] | None = None,
    batch_size: int = 64,
) -> FeatureSummary:
    """Features of all images, a batch at a time; those kept are evenly spread over the set.

    `progress` is called with the number of images of each finished batch. Raises ValueError for
    fewer than two images, and whatever reading them raises.
    """
    statistics = FeatureStatistics()
    rows = min(images.count, KEPT)
    wanted = torch.arange(rows, dtype=torch.int64) * images.count // max(rows, 1)
    kept: list[Tensor] = []
    for batch in images.batches(batch_size):
        with _exact_convolutions():
            features = network(batch).float().cpu()
        here = wanted[(wanted >= statistics.count) & (wanted < statistics.count + len(features))]
        kept.append(features[here - statistics.count])
        statistics.update(features)
        if progress is not None:
            progress(len(batch))
    mean, features = statistics.mean, torch.cat(kept)
    if len(features) == statistics.count <= features.shape[1]:
        # Deviations are a factor as they are, and of few images a small one.
        factor = (features.double() - mean).T / math.sqrt(max(statistics.count - 1, 1))
    else:
        factor = covariance_factor(statistics.covariance)
    return FeatureSummary(mean, factor, features)


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Convolutions in fp32, where a GPU would round their inputs to TF32."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before
