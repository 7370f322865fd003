"""Score generated images against real ones."""

from dimr_fast.evaluation.features import EfficientNetLite0Features, InceptionFeatures
from dimr_fast.evaluation.frechet import FrechetScores, frechet_scores, frechet_to_reference
from dimr_fast.evaluation.image_sets import TensorImages, open_images
from dimr_fast.evaluation.job import EvaluateConfig, Scores, evaluate
from dimr_fast.evaluation.real_images import cached_statistics
from dimr_fast.evaluation.statistics import compute_statistics

quick_score = frechet_to_reference
"""Earlier name of `frechet_to_reference`."""

__all__ = [
    "EfficientNetLite0Features",
    "EvaluateConfig",
    "FrechetScores",
    "InceptionFeatures",
    "Scores",
    "TensorImages",
    "cached_statistics",
    "compute_statistics",
    "evaluate",
    "frechet_scores",
    "frechet_to_reference",
    "open_images",
    "quick_score",
]
