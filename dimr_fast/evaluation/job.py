"""Score images against real ones and state how: `dimr-fast evaluate`."""

import dataclasses
import json
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dimr_fast.checkpoint import load_model
from dimr_fast.data.autoencoder import load_decoder
from dimr_fast.evaluation.features import (
    INCEPTION_URL,
    EfficientNetLite0Features,
    FeatureNetwork,
    InceptionFeatures,
)
from dimr_fast.evaluation.image_sets import ImageSet, counts_in_words, open_images
from dimr_fast.evaluation.metrics import inception_score, precision_recall
from dimr_fast.evaluation.real_images import Reference
from dimr_fast.evaluation.statistics import FeatureStatistics, compute_statistics
from dimr_fast.sampling.sampler import ImageSampler, SamplerConfig, balanced_labels
from dimr_fast.sampling.writers import SAMPLE_REPORT
from dimr_fast.utils.device import device_name, keep_freed_memory, resolve_device
from dimr_fast.utils.files import prepare_output, remove_unfinished, user_cache, write_json
from dimr_fast.utils.validation import require_fields

REPORT = "evaluation.json"
"""File that `evaluate` writes to its folder."""
SPLITS, NEIGHBOURS = 10, 3
"""Splits of the Inception score and neighbours of precision and recall, as published."""
BIASED_BELOW = 10_000
"""Under this many images a note states that the Fréchet distance is biased upwards."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of an evaluation."""

    images: Path | None = None
    """Images to score: a folder of files, or an .npz as the ADM evaluation suite takes them."""
    checkpoint: Path | None = None
    """Instead of `images`: a model that draws them, the same number for each class."""
    reference: str
    """Real images: a folder, an .npz with images (arr_0) or Inception statistics (mu, sigma), or
    `tiles`, the demo's validation tiles."""
    output: Path
    """Output folder for `evaluation.json`, which must not exist yet."""
    autoencoder: str | None = None
    """Folder or name of the AutoencoderKL that decodes the latents of a latent model, or a file
    autoencoder_kl_ema.pth of the published code."""
    count: int = 10_000
    """Images to draw from the checkpoint; published scores use 50,000."""
    inception_weights: Path | None = None
    """Weights file of torch-fidelity's Inception v3, for FID and the Inception score. Without it,
    features come from EfficientNet-Lite0."""
    cache: Path | None = None
    """Folder that caches statistics of references; by default in the user's cache folder."""
    device: str = "auto"
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def validate(self) -> None:
        """Raise ValueError naming a setting that is out of range."""
        given = [path for path in (self.images, self.checkpoint) if path is not None]
        if len(given) != 1:
            raise ValueError(f"images, checkpoint: got {len(given)} of them, expected one")
        self.sampler.validate()
        require_fields(self, count=(self.count >= SPLITS, f"{SPLITS} or more"))


@dataclass(frozen=True)
class Scores:
    """Scores of an image set, with all settings that they depend on.

    `metric` names `distance`; it is "FID" only with the published Inception weights.
    `inception_score` is (mean, standard deviation). A score that could not be computed is None, and
    `notes` say why.
    """

    metric: str
    distance: float
    inception_score: tuple[float, float] | None
    precision: float | None
    recall: float | None
    recipe: dict[str, Any]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.metric}: {self.distance:.2f}"]
        if self.inception_score is not None:
            mean, deviation = self.inception_score
            lines.append(f"Inception score: {mean:.2f} ± {deviation:.2f}")
        if self.precision is not None:
            lines.append(f"precision: {self.precision:.3f}, recall: {self.recall:.3f}")
        lines += [f"  {name}: {_in_words(value)}" for name, value in self.recipe.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def evaluate(config: EvaluateConfig, *, network: FeatureNetwork | None = None) -> Scores:
    """Score images against a reference; write and return the scores with their recipe.

    `network` replaces the network that computes the features, which `config` chooses otherwise.

    Raises, before any work, ValueError for an unusable setting, image, weights file or reference,
    CheckpointError and DataUnavailableError as loading does, FileExistsError where the report is
    there already and OSError where it cannot be written.
    """
    config.validate()
    device = resolve_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    images: ImageSet
    if config.checkpoint is not None:
        images = _DrawnImages(config, config.checkpoint, device)
    else:
        assert config.images is not None
        images = open_images(config.images)
    reference = Reference.open(config.reference, images.size)
    if network is None:
        weights = config.inception_weights
        network = EfficientNetLite0Features() if weights is None else InceptionFeatures(weights)
    reference.check(network)
    for name, some in (("images", images), ("reference", reference.images)):
        if some is not None and some.count < SPLITS:
            raise ValueError(f"{name}: got {some.count} images, expected {SPLITS} or more")
    prepare_output(config.output, (REPORT,))
    remove_unfinished(config.output, REPORT)

    network.to(device)
    real = reference.statistics(network, config.cache or user_cache())
    with tqdm(total=images.count, unit="image", desc="scoring") as bar:
        found = compute_statistics(network, images, bar.update)
    precision, recall = None, None
    if len(real.features):
        pair = (found.features.to(device), real.features.to(device))
        precision, recall = precision_recall(*pair, k=NEIGHBOURS)
    recipe = _recipe(config, images, network, reference, real, device)
    scores = Scores(
        metric=_metric(network),
        distance=found.distance(real),
        inception_score=(
            inception_score(network.logits(found.features), SPLITS)
            if isinstance(network, InceptionFeatures)
            else None
        ),
        precision=precision,
        recall=recall,
        recipe=recipe,
        notes=tuple(_notes(images, recipe, network, reference)),
    )
    try:
        write_json(config.output / REPORT, dataclasses.asdict(scores))
    except OSError as error:
        raise OSError(f"{error}; the scores are\n{scores}") from error
    return scores


class _DrawnImages:
    """Images that a model draws batch by batch."""

    def __init__(self, config: EvaluateConfig, checkpoint: Path, device: torch.device) -> None:
        trained = load_model(checkpoint)
        trained.model.to(device)
        shape = trained.model.config.shape
        decode, size = load_decoder(config.autoencoder, trained.scale, shape, device)
        self._draw = ImageSampler(trained, config.sampler, decode)
        self._labels = balanced_labels(config.count, len(trained.classes))
        self._batch_size = config.sampler.batch_size
        self.source, self.count, self.size = "drawn", config.count, size
        self.classes = counts_in_words(self._labels.bincount().tolist())
        self.recipe = {
            "checkpoint": str(checkpoint),
            "autoencoder": config.autoencoder,
            **config.sampler.recipe(trained, device),
        }

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        first = 0
        # The sampler's own batches, so that images are those that `sample` would draw.
        for labels in self._labels.split(self._batch_size):
            yield from self._draw(labels, first=first).split(batch_size)
            first += len(labels)


def _metric(network: FeatureNetwork) -> str:
    if isinstance(network, InceptionFeatures) and network.published:
        return "FID"
    return f"Fréchet distance on {network.name}"


def _recipe(
    config: EvaluateConfig,
    images: ImageSet,
    network: FeatureNetwork,
    reference: Reference,
    real: FeatureStatistics,
    device: torch.device,
) -> dict[str, Any]:
    stored = reference.images
    sampling = _sampling(config, images)
    packages = ("dimr_fast", "numpy", "pillow", *network.packages)
    return {
        "images": {
            "source": images.source,
            "count": images.count,
            "size": f"{images.size[0]}x{images.size[1]}",
            "labels": _balance(images, sampling),
            "pixels": "rounded and clamped to 8 bits" if config.checkpoint else "8 bits, as stored",
        },
        "sampling": sampling,
        "features": {
            "network": network.name,
            "input": f"{network.input_size}x{network.input_size}, {network.resize}",
            "precision": "fp32",
            "weights": network.weights_hash,
            "device": device_name(device),
        },
        "reference": {
            "source": config.reference if stored is None else stored.source,
            "count": "unknown" if stored is None else stored.count,
            "size": "unknown" if stored is None else f"{stored.size[0]}x{stored.size[1]}",
            "labels": "unknown" if stored is None else stored.classes,
            "fingerprint": reference.fingerprint,
            "distance to": "mu and sigma of the file"
            if reference.uses_statistics_file(network)
            else "its images",
            "cached": real.cached,
        },
        "settings": {
            "precision and recall": f"{NEIGHBOURS} nearest neighbours",
            "Inception score": f"{SPLITS} parts of shuffled images",
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: metadata.version(name) for name in packages},
        },
    }


def _sampling(config: EvaluateConfig, images: ImageSet) -> dict[str, Any] | str:
    """Return how the images were drawn, as far as it is known."""
    if isinstance(images, _DrawnImages):
        return images.recipe
    assert config.images is not None
    beside = [config.images.parent / SAMPLE_REPORT]
    if config.images.is_dir():
        beside.insert(0, config.images / SAMPLE_REPORT)
    for path in beside:
        try:
            return {"said in": str(path), **json.loads(path.read_bytes())}
        except (OSError, ValueError, TypeError):
            continue
    return f"unknown: no {SAMPLE_REPORT} beside the images"


def _balance(images: ImageSet, sampling: dict[str, Any] | str) -> str:
    """Return how many images each class has: counted, or as the sampling report states it."""
    said = sampling.get("labels") if isinstance(sampling, dict) else None
    return str(said) if images.classes == "unknown" and said else images.classes


def _notes(
    images: ImageSet, recipe: dict[str, Any], network: FeatureNetwork, reference: Reference
) -> Iterator[str]:
    if images.count < BIASED_BELOW:
        yield (
            f"{images.count} images are few: under {BIASED_BELOW:,} the distance is well above "
            f"that of many images. Only scores of {images.count} images and this reference compare"
        )
    else:
        yield f"only scores of {images.count} images and this reference compare"
    if not isinstance(network, InceptionFeatures):
        yield (
            "FID and the Inception score were not computed: they need the weights of Inception v3, "
            f"from {INCEPTION_URL}, given with --inception-weights"
        )
    elif not network.published:
        yield "the weights of Inception v3 are not the published ones: no score here is a FID"
    if reference.images is None:
        yield "precision and recall were not computed: the reference holds no images"
    elif reference.images.size != images.size:
        yield "images and reference differ in size; the distance also measures this difference"
    sampling = recipe["sampling"]
    if isinstance(sampling, dict) and sampling.get("finished") is False:
        yield "the job that draws these images is not finished"
    if recipe["images"]["labels"] == "unknown":
        yield "the balance of labels is unknown; balanced labels score lower than random ones"


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_in_words(item)}" for name, item in value.items())
    # Twelve digits of a hash are enough to compare by eye.
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", str(value))
