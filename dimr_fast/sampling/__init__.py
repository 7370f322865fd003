"""Draw images from a trained model, in memory or as files."""

from dimr_fast.sampling.job import FILES, SampleConfig, sample
from dimr_fast.sampling.sampler import (
    ImageSampler,
    Sampler,
    SamplerConfig,
    balanced_labels,
    sample_images,
)

__all__ = [
    "FILES",
    "ImageSampler",
    "SampleConfig",
    "Sampler",
    "SamplerConfig",
    "balanced_labels",
    "sample",
    "sample_images",
]
