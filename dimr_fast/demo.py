"""The whole job on real images: train, sample and score, on whatever the machine has."""

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
from dimr_fast.data.tiles import load_tiles
from dimr_fast.device import resolve_device
from dimr_fast.evaluation import frechet_scores
from dimr_fast.features import EfficientNetLite0Features
from dimr_fast.files import claim, write_json
from dimr_fast.sampling import ImageSampler, SampleConfig, Sampler, sample
from dimr_fast.train_config import TrainConfig
from dimr_fast.training import train

REPORT = "demo.json"
BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed}{postfix}"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """How long to train, and where to put what comes out."""

    minutes: float = 10.0
    """Training time; sampling for the score takes a fifth of it, two minutes at most."""
    output: Path | None = None
    """Folder of the run; by default runs/demo-DATE-TIME."""
    device: str = "auto"
    seed: int = 0


def demo(config: DemoConfig) -> Path:
    """Train the `demo` preset on satellite tiles, draw a grid of each class, score; say it all.

    Returns the folder, with what `train` and `sample` leave and `demo.json`; after Ctrl-C while
    training, with what `train` leaves. Raises as they do.
    """
    output = config.output or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    # What can fail does so before the ten minutes, not after them.
    features = EfficientNetLite0Features()
    claim(output, (*training.FILES, *sampling.FILES, REPORT))
    recipe = TrainConfig(
        output=output, minutes=config.minutes, device=config.device, seed=config.seed
    )
    summary = train(recipe)
    print(summary.sentence(recipe))
    if summary.interrupted:
        return output
    sampler = Sampler(seed=config.seed)
    checkpoint = output / training.CHECKPOINT
    sample(
        SampleConfig(checkpoint=checkpoint, output=output, device=config.device, sampler=sampler)
    )

    tiles = load_tiles()
    trained = load_model(checkpoint)
    trained.model.to(resolve_device(config.device))
    # The classes in their natural shares, as in the tiles that the samples are compared with.
    generator = torch.Generator().manual_seed(config.seed)
    labels = tiles.train_labels[torch.randperm(len(tiles.train_labels), generator=generator)]
    samples, seconds = _samples_for_score(trained, labels, sampler, min(120.0, 12 * config.minutes))
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
                **sampler.recipe(trained.scale, resolve_device(config.device)),
            },
            "scores": dataclasses.asdict(scores),
        },
    )
    print(scores)
    print("wrote", *(f"  {path}" for path in sorted(output.iterdir())), sep="\n")
    return output


def _samples_for_score(
    trained: TrainedModel, labels: Tensor, sampler: Sampler, seconds: float
) -> tuple[Tensor, float]:
    """As many images as `seconds` give, a batch at least, and the time they took."""
    # Streams of their own, beside those of the grid.
    draw = ImageSampler(trained, dataclasses.replace(sampler, seed=sampler.seed + 1))
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
