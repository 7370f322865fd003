"""Statistics of an image set's features: mean, covariance and the features themselves."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dimr_fast.evaluation.features import FeatureNetwork
from dimr_fast.evaluation.image_sets import ImageSet
from dimr_fast.evaluation.metrics import (
    StatisticsAccumulator,
    covariance_factor,
    frechet_from_factors,
)

MAX_FEATURES = 50_000
"""Maximum number of features kept of a set, for precision and recall; published scores use
50,000."""


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean [D] and factor F [D, any] of the unbiased covariance F Fᵀ, in fp64, and features.

    `features` are fp32 [at most MAX_FEATURES, D]; `cached` says whether a cache was read.
    """

    mean: Tensor
    factor: Tensor
    features: Tensor
    cached: bool = False

    def distance(self, other: "FeatureStatistics") -> float:
        """Return the Fréchet distance to another set's statistics from the same network."""
        return frechet_from_factors(self.mean, self.factor, other.mean, other.factor)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, as a cache stores them."""
        return {"mean": self.mean, "factor": self.factor, "features": self.features}


def compute_statistics(
    network: FeatureNetwork,
    images: ImageSet,
    progress: Callable[[int], object] | None = None,
    batch_size: int = 64,
    max_features: int = MAX_FEATURES,
) -> FeatureStatistics:
    """Compute statistics of all images batch by batch; keep at most `max_features` of the features.

    The kept ones are evenly spaced.
    `progress` is called with the number of images of each finished batch. Raises ValueError for
    fewer than two images, and whatever reading them raises.
    """
    statistics = StatisticsAccumulator()
    rows = min(images.count, max_features)
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
        # The deviations themselves are a factor, a small one for few images.
        factor = (features.double() - mean).T / math.sqrt(max(statistics.count - 1, 1))
    else:
        factor = covariance_factor(statistics.covariance)
    # In the layout that a cache returns: another one changes the order of sums in a distance, and
    # its last bits.
    return FeatureStatistics(mean, factor.contiguous(), features)


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Compute convolutions in fp32; by default a GPU rounds their inputs to TF32."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before
