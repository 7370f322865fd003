"""Train, sample and score on satellite tiles, on any machine: `dimr-fast demo`."""

import dataclasses
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dimr_fast import sampling, training
from dimr_fast.checkpoint import TrainedModel, load_model
from dimr_fast.data.arrays import ImageArray
from dimr_fast.data.tiles import Tiles, load_tiles
from dimr_fast.errors import Interrupted
from dimr_fast.evaluation.features import EfficientNetLite0Features
from dimr_fast.evaluation.frechet import frechet_scores
from dimr_fast.sampling import ImageSampler, SampleConfig, SamplerConfig, sample
from dimr_fast.training import TrainConfig, train
from dimr_fast.utils.device import resolve_device
from dimr_fast.utils.files import prepare_output, write_json
from dimr_fast.utils.validation import check_seed, require_fields

REPORT = "demo.json"
SCORED_IMAGES = 1536
"""Images that are scored, fewer if there is no time: distances of other numbers differ."""
BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed}{postfix}"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of the demo."""

    minutes: float = 10.0
    """Training time. Sampling for the score takes a fifth of it at most."""
    output: Path | None = None
    """Output folder; by default runs/demo-DATE-TIME."""
    device: str = "auto"
    seed: int = 0

    def validate(self) -> None:
        """Raise ValueError naming a setting that is out of range."""
        require_fields(
            self, minutes=(self.minutes > 0, "a positive number"), seed=check_seed(self.seed)
        )


def demo(
    config: DemoConfig, *, tiles: Tiles | None = None, sampler: SamplerConfig | None = None
) -> Path:
    """Train the `demo` preset on satellite tiles, draw a grid of each class, and score it.

    Returns the output folder, with the files of `train` and `sample` and `demo.json`. A signal
    during training ends the demo with the files of `train` and raises Interrupted. `tiles` and
    `sampler` replace the tiles of the installed picture and the default settings of sampling.
    Raises as `train` and `sample` do.
    """
    config.validate()
    output = config.output or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    # Before training, because a missing package should not fail after ten minutes.
    features = EfficientNetLite0Features()
    prepare_output(output, (*training.FILES, *sampling.FILES, REPORT))
    recipe = dataclasses.replace(
        TrainConfig.read("demo", output=output),
        minutes=config.minutes,
        device=config.device,
        seed=config.seed,
    )
    tiles = load_tiles() if tiles is None else tiles
    examples = ImageArray(tiles.train_images, tiles.train_labels, tiles.classes)
    summary = train(recipe, examples=examples)
    print(summary.sentence(recipe))
    if summary.signal is not None:
        raise Interrupted(summary.signal)
    sampler = SamplerConfig(seed=config.seed) if sampler is None else sampler
    checkpoint = output / training.CHECKPOINT
    sample(
        SampleConfig(checkpoint=checkpoint, output=output, device=config.device, sampler=sampler)
    )

    trained = load_model(checkpoint)
    trained.model.to(resolve_device(config.device))
    # Class frequencies of the training tiles, which the held-out tiles share.
    generator = torch.Generator().manual_seed(config.seed)
    labels = tiles.train_labels[torch.randperm(len(tiles.train_labels), generator=generator)]
    samples, seconds = _samples_for_score(
        trained, labels[:SCORED_IMAGES], sampler, min(120.0, 12 * config.minutes)
    )
    print(f"scoring {len(samples)} samples against {len(tiles.val_images)} held-out tiles …")
    scores = frechet_scores(
        features.to(resolve_device(config.device)), samples, tiles.train_images, tiles.val_images
    )
    write_json(
        output / REPORT,
        {
            "dimr_fast": metadata.version("dimr_fast"),
            "date": time.strftime("%Y-%m-%d"),
            "training": dataclasses.asdict(summary),
            "sampling": {
                "images": len(samples),
                "seconds": seconds,
                "labels": "drawn as in the training tiles",
                **sampler.recipe(trained, resolve_device(config.device)),
            },
            "scores": dataclasses.asdict(scores),
        },
    )
    print(scores)
    print("wrote", *(f"  {path}" for path in sorted(output.iterdir())), sep="\n")
    return output


def _samples_for_score(
    trained: TrainedModel, labels: Tensor, sampler: SamplerConfig, seconds: float
) -> tuple[Tensor, float]:
    """Draw images for `seconds`, at least one batch; return them and the time they took."""
    # Another seed: the images must differ from those of the grid.
    draw = ImageSampler(trained, dataclasses.replace(sampler, seed=(sampler.seed + 1) % 2**64))
    begun = time.monotonic()
    batches: list[Tensor] = []
    count, elapsed = 0, 0.0
    with tqdm(total=seconds, desc="sampling for the score", bar_format=BAR) as bar:
        for batch in labels.split(sampler.batch_size):
            batches.append(draw(batch, first=count))
            count += len(batch)
            elapsed = time.monotonic() - begun
            bar.set_postfix_str(f"{count} images", refresh=False)
            bar.update(min(elapsed, seconds) - bar.n)
            if elapsed * (len(batches) + 1) / len(batches) > seconds:
                break
    return torch.cat(batches), elapsed
