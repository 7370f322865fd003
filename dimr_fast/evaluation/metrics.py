"""Metrics on features of images: Fréchet distance, Inception score, precision and recall."""

import math

import torch
from torch import Tensor


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """Return the squared Fréchet (2-Wasserstein) distance of two Gaussians, in fp64.

    Means are [D], covariances [D, D], symmetric and positive semi-definite of any rank.
    |mu1 - mu2|² + tr(C1 + C2 - 2 (C1 C2)^½), Dowson and Landau (1982).
    """
    return frechet_from_factors(mu1, covariance_factor(cov1), mu2, covariance_factor(cov2))


def frechet_from_factors(mu1: Tensor, factor1: Tensor, mu2: Tensor, factor2: Tensor) -> float:
    """Return `frechet_distance` of covariances C = F Fᵀ given by factors F [D, any]."""
    mu1, factor1, mu2, factor2 = (x.double() for x in (mu1, factor1, mu2, factor2))
    # tr((C1 C2)^½) is the sum of the singular values of F1ᵀ F2. This avoids the square root of a
    # non-symmetric and, with fewer samples than features, singular product.
    overlap = torch.linalg.svdvals(factor1.T @ factor2).sum()
    traces = factor1.square().sum() + factor2.square().sum()
    return max(float((mu1 - mu2).square().sum() + traces - 2 * overlap), 0.0)


def covariance_factor(cov: Tensor) -> Tensor:
    """Return F [D, rank] with F Fᵀ = cov, in fp64; eigenvalues that round to zero are dropped."""
    cov = cov.double()
    negligible = len(cov) * torch.finfo(cov.dtype).eps
    # Cholesky takes a tenth of the time of eigh, where it exists.
    factor, failed = torch.linalg.cholesky_ex(cov)
    pivots = factor.diagonal().square()
    if not failed and pivots.min() > negligible * pivots.max():
        return factor
    values, vectors = torch.linalg.eigh(cov)
    kept = values > values[-1].clamp(min=0) * negligible
    return vectors[:, kept] * values[kept].sqrt()


class StatisticsAccumulator:
    """Accumulate mean and covariance of features that arrive in batches, in fp64.

    Deviations are summed about a running mean (Chan, Golub and LeVeque, 1979), so that a mean far
    from zero costs no precision.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add features [N, D]."""
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
    def mean(self) -> Tensor:
        """Mean, fp64 [D]. Raises ValueError before the first update."""
        if self.count < 1:
            raise ValueError("a mean needs at least one feature")
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance, fp64 [D, D]. Raises ValueError for fewer than two features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two features, got {self.count}")
        return self._scatter / (self.count - 1)


def inception_score(logits: Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Return mean and standard deviation of the Inception score over `splits` parts, in fp64.

    The score is exp(mean KL(p(y|x) ‖ p(y))), Salimans et al. (2016). `logits` [N, classes] are
    shuffled by `seed` first, because images are often sorted by class. Raises ValueError for fewer
    logits than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"logits: got {len(logits)} images, expected {splits} or more")
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    scores = []
    for part in logits.cpu().double()[order].tensor_split(splits):
        log_p = part.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    found = torch.stack(scores)
    return float(found.mean()), float(found.std(correction=0))


def precision_recall(
    samples: Tensor, reference: Tensor, k: int = 3, chunk: int = 1024
) -> tuple[float, float]:
    """Return precision and recall of samples, features [N, D], and a reference [M, D].

    A sample counts as covered if it lies within the k-nearest-neighbour radius of at least one
    sample of the other set (Kynkäänniemi et al. 2019, algorithm 1). Precision is the covered
    fraction of `samples`, recall that of `reference`. Raises ValueError for `k` features or fewer.
    """
    for name, features in (("samples", samples), ("reference", reference)):
        if len(features) <= k:
            raise ValueError(f"{name}: got {len(features)} images, expected more than k = {k}")
    # cdist uses matrix products: a large common mean would cost precision.
    center = reference.mean(0)
    samples, reference = samples - center, reference - center

    def covered(features: Tensor, other: Tensor) -> float:
        # The nearest neighbour in its own set is the feature itself, hence k + 1.
        nearest = [torch.cdist(x, other).topk(k + 1, largest=False) for x in other.split(chunk)]
        radii = torch.cat([found.values[:, k] for found in nearest])
        inside = [(torch.cdist(x, other) <= radii).any(1) for x in features.split(chunk)]
        return float(torch.cat(inside).double().mean())

    return covered(samples, reference), covered(reference, samples)
