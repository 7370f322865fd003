"""The whole job on real images: train, sample and score, on whatever the machine has."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dimr_fast.checkpoint import load_model
from dimr_fast.data.tiles import load_tiles
from dimr_fast.device import resolve_device
from dimr_fast.evaluation import EfficientNetLite0Features, frechet_scores
from dimr_fast.files import write_json
from dimr_fast.sampling import SampleConfig, sample, sample_images
from dimr_fast.training import CHECKPOINT, TrainConfig, train


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

    Returns the folder, with `checkpoint.safetensors`, `loss.png`, `grid.png` and `demo.json`; after
    Ctrl-C while training only with what `train` leaves. Raises as `train` does.
    """
    output = config.output or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    # Before the ten minutes, not after them.
    features = EfficientNetLite0Features()
    settings = TrainConfig(
        output=output, minutes=config.minutes, device=config.device, seed=config.seed
    )
    training = train(settings)
    print(training.sentence(output))
    if training.interrupted:
        return output
    drawing = SampleConfig(
        checkpoint=output / CHECKPOINT, output=output, device=config.device, seed=config.seed
    )
    grid = sample(drawing)

    tiles = load_tiles()
    samples, seconds = _samples_for_score(
        drawing, tiles.train_labels, min(120.0, 12 * config.minutes)
    )
    print(f"scoring {len(samples)} samples against {len(tiles.val_images)} held-out tiles …")
    scores = frechet_scores(
        features.to(resolve_device(config.device)), samples, tiles.train_images, tiles.val_images
    )
    report = output / "demo.json"
    write_json(
        report,
        {
            "training": dataclasses.asdict(training),
            "sampling": {
                "images": len(samples),
                "seconds": seconds,
                "solver": "DPM-Solver++ single-step, order 3",
                "steps": drawing.steps,
                "guidance": drawing.guidance,
                "noise_limit": drawing.noise_limit,
                "labels": "drawn as in the training tiles",
            },
            "scores": dataclasses.asdict(scores),
        },
    )
    print(
        f"{scores}\n"
        f"wrote {grid}\n"
        f"      {output / 'loss.png'}\n"
        f"      {output / CHECKPOINT}\n"
        f"      {report}"
    )
    return output


def _samples_for_score(
    config: SampleConfig, train_labels: Tensor, seconds: float
) -> tuple[Tensor, float]:
    """As many images as `seconds` give, a batch at least, and the time they took."""
    trained = load_model(config.checkpoint)
    trained.model.to(resolve_device(config.device))
    generator = torch.Generator().manual_seed(config.seed)
    # The classes in their natural shares, as in the tiles that the samples are compared with.
    labels = train_labels[torch.randperm(len(train_labels), generator=generator)]
    begun = time.monotonic()
    batches: list[Tensor] = []
    with tqdm(
        total=seconds, bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}{postfix}"
    ) as bar:
        bar.set_description("sampling for the score")
        for index, batch in enumerate(labels.split(config.batch_size)):
            batches.append(
                sample_images(
                    trained,
                    batch,
                    steps=config.steps,
                    guidance=config.guidance,
                    noise_limit=config.noise_limit,
                    seed=config.seed + 1 + index,
                )
            )
            elapsed = time.monotonic() - begun
            bar.set_postfix_str(f"{sum(map(len, batches))} images", refresh=False)
            bar.update(min(elapsed, seconds) - bar.n)
            if elapsed * (len(batches) + 1) / len(batches) > seconds:
                break
    return torch.cat(batches), time.monotonic() - begun
