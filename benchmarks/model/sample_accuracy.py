"""Compare samples of the packaged model in lower precision with those in fp32.

    python -m benchmarks.model.sample_accuracy [--precisions bf16 int8 fp8] [--out FILE]

All start from the same noise; solver and guidance are the defaults of `dimr-fast sample`. The
results file has percentiles over the images of the PSNR of an image, in dB, from its levels of 0 to
255. A quantised format passes with a median of 45 dB. The precisions of `--frechet` also draw 1,536
samples of balanced classes, whose Fréchet distance to the held-out tiles may be 2 % above bf16's.
On a CPU, FP8 products have the values of a GPU's but for the order of sums; they are slow there.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.utils import machine
from benchmarks.utils.files import RESULTS
from dimr_fast.checkpoint import TrainedModel, demo_model, load_model
from dimr_fast.data.tiles import load_tiles
from dimr_fast.evaluation import (
    EfficientNetLite0Features,
    TensorImages,
    compute_statistics,
    frechet_to_reference,
)
from dimr_fast.sampling import ImageSampler, SamplerConfig, balanced_labels
from dimr_fast.utils.files import write_json

REQUIRED_DB = 45.0
LARGEST_RATIO = 1.02
"""Of Fréchet distances, a quantised format's to bf16's."""
PUBLISHED_SOLVER = {"solver": "dpm++", "spacing": "time", "guidance": 1.0}
"""With guidance, which magnifies the errors of predictions."""
PERCENTILES = {"minimum": 0.0, "p20": 0.2, "median": 0.5, "p80": 0.8}


def draw(trained: TrainedModel, count: int, **settings: object) -> Tensor:
    """Return uint8 images `[count, 3, H, W]` of all classes."""
    sampler = ImageSampler(trained, SamplerConfig(**settings))  # type: ignore[arg-type]
    return sampler(balanced_labels(count, len(trained.classes)))


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image, in dB.

    Equal images count as if one number differed by one level.
    """
    squares = (images.double() - truth.double()).square().flatten(1)
    return 10 * torch.log10(255**2 / squares.mean(1).clamp(min=1 / squares.shape[1]))


def frechet(
    trained: TrainedModel, precisions: list[str], count: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return the Fréchet distance of each precision's samples to the held-out tiles."""
    features = EfficientNetLite0Features()
    reference = compute_statistics(features, TensorImages(load_tiles().val_images, "held out"))
    distances = {
        precision: frechet_to_reference(
            features, draw(trained, count, precision=precision, **settings), reference
        )
        for precision in precisions
    }
    return {"frechet": distances, "frechet_count": count, "frechet_recipe": features.recipe}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "int8", "fp8"])
    parser.add_argument("--frechet", nargs="*", default=["bf16", "int8"])
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--frechet-count", type=int, default=1536)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", type=Path, default=RESULTS / "sample_accuracy.json")
    arguments = parser.parse_args()
    trained = load_model(demo_model())
    settings = {"steps": arguments.steps, "batch_size": 32, **PUBLISHED_SOLVER}
    truth = draw(trained, arguments.count, precision="fp32", **settings)
    found = {}
    for precision in arguments.precisions:
        images = draw(trained, arguments.count, precision=precision, **settings)
        levels = torch.tensor(list(PERCENTILES.values()), dtype=torch.float64)
        values = psnr(images, truth).quantile(levels)
        found[precision] = dict(zip(PERCENTILES, values.tolist(), strict=True))
    result = machine.description() | {
        "steps": arguments.steps,
        "count": arguments.count,
        "required_db": REQUIRED_DB,
        "psnr_db": found,
    }
    if arguments.frechet:
        result |= frechet(trained, arguments.frechet, arguments.frechet_count, settings)
    write_json(arguments.out, result)
    print(result)
    low = [precision for precision, db in found.items() if db["median"] < REQUIRED_DB]
    if low:
        raise SystemExit(f"the median is below {REQUIRED_DB:g} dB: {', '.join(low)}")
    distances = result.get("frechet", {})
    far = [p for p, d in distances.items() if d > LARGEST_RATIO * distances.get("bf16", d)]
    if far:
        raise SystemExit(f"the Fréchet distance is over {LARGEST_RATIO:g} of bf16's: {far}")


if __name__ == "__main__":
    main()
