"""Score the packaged model's samples over network evaluations, solvers, spacings and guidance.

    python -m benchmarks.model.sampling_curve [--count 768] [--checkpoint FILE] [--out FILE]

Every point draws the same balanced classes from the same noise, and scores them against the
held-out tiles: Fréchet distance, precision and recall. Points that the results file already has, of
the same weights and count, are not drawn again, so a run that was interrupted goes on. Images a
second depend only on the number of evaluations and on whether there is guidance; they are measured
at the end, in alternation, and need a quiet machine.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.utils import machine
from benchmarks.utils.files import RESULTS
from dimr_fast.checkpoint import TrainedModel, demo_model, load_model
from dimr_fast.data.tiles import load_tiles
from dimr_fast.diffusion import SOLVERS
from dimr_fast.evaluation import EfficientNetLite0Features, TensorImages, compute_statistics
from dimr_fast.evaluation.metrics import precision_recall
from dimr_fast.evaluation.statistics import FeatureStatistics
from dimr_fast.inference import InferenceDiMR
from dimr_fast.sampling import ImageSampler, SamplerConfig, balanced_labels
from dimr_fast.utils.files import write_json
from dimr_fast.utils.tensors import sha256_of_named

STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 25, 50)
GUIDANCE = {
    ("dpm++", "time"): (1.0, 0.5),
    ("dpm++2m", "log_snr"): (0.5, 0.0, 0.25, 1.0),
    ("dpm++3m", "log_snr"): (0.0, 0.5),
}
"""Of a solver and spacing; the others are drawn with 0.5."""
MOST_STEPS = 8
"""Of all curves but the first of a solver in `GUIDANCE`: more steps take the most time."""
KEYS = ("solver", "spacing", "guidance", "steps")
BATCH_SIZE = 64


def points() -> Iterator[dict[str, Any]]:
    """Yield the settings of the points, curve by curve."""
    others = [
        curve for curve in itertools.product(SOLVERS, ("time", "log_snr")) if curve not in GUIDANCE
    ]
    for curve in (*GUIDANCE, *others):
        for place, guidance in enumerate(GUIDANCE.get(curve, (0.5,))):
            most = STEPS[-1] if curve in GUIDANCE and place == 0 else MOST_STEPS
            for steps in STEPS:
                if steps <= most:
                    yield dict(zip(KEYS, (*curve, guidance, steps), strict=True))


def sampler_of(
    trained: TrainedModel, sampling: dict[str, Any], point: dict[str, Any]
) -> ImageSampler:
    """Return a sampler whose settings are `sampling` and those of the point."""
    return ImageSampler(trained, SamplerConfig(batch_size=BATCH_SIZE, **sampling, **point))


def score(
    draw: ImageSampler,
    labels: Tensor,
    features: EfficientNetLite0Features,
    reference: FeatureStatistics,
) -> dict[str, float]:
    """Draw an image for each label and return the scores of the images.

    `evaluations` are those of all networks for one image.
    """
    evaluated = 0

    def count_rows(_: object, __: object, outputs: Sequence[Tensor]) -> None:
        nonlocal evaluated
        evaluated += len(outputs[-1])

    hooks = [
        network.register_forward_hook(count_rows)
        for network in draw.network.modules()
        if isinstance(network, InferenceDiMR)
    ]
    images = draw(labels)
    for hook in hooks:
        hook.remove()
    found = compute_statistics(features, TensorImages(images, "samples"))
    precision, recall = precision_recall(found.features, reference.features)
    return {
        "frechet": found.distance(reference),
        "precision": precision,
        "recall": recall,
        "evaluations": evaluated / len(labels),
    }


def rates(trained: TrainedModel, rounds: int) -> list[dict[str, Any]]:
    """Return median images a second of a batch for each number of steps, guided and not."""
    labels = balanced_labels(BATCH_SIZE, len(trained.classes))
    found = []
    for guided in (True, False):
        draws = {
            steps: ImageSampler(
                trained,
                SamplerConfig(
                    batch_size=BATCH_SIZE, solver="dpm++2m", steps=steps, guidance=0.5 * guided
                ),
            )
            for steps in STEPS
        }
        seconds: dict[int, list[float]] = {steps: [] for steps in STEPS}
        for _, (steps, draw) in itertools.product(range(rounds + 1), draws.items()):
            start = time.monotonic()
            draw(labels)
            seconds[steps].append(time.monotonic() - start)
        # The first call of each is slower.
        medians = {steps: statistics.median(times[1:]) for steps, times in seconds.items()}
        found += [
            {"guided": guided, "steps": steps, "images_per_second": BATCH_SIZE / median}
            for steps, median in medians.items()
        ]
    return found


def argument_parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """Return a parser of the arguments that `score_points` needs; `out` is a name in `results/`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--checkpoint", type=Path, default=demo_model())
    parser.add_argument("--count", type=int, default=768)
    parser.add_argument("--out", type=Path, default=RESULTS / out)
    return parser


def score_points(
    trained: TrainedModel,
    count: int,
    out: Path,
    points: Iterable[dict[str, Any]],
    sampling: dict[str, Any] | None = None,
    sampler: Callable[[TrainedModel, dict[str, Any], dict[str, Any]], ImageSampler] = sampler_of,
) -> dict[str, Any]:
    """Draw and score the points that the results file `out` does not have; return its contents.

    `sampling` are settings that all points have, which the file states once. `sampler` makes the
    sampler of the model, of these settings and of a point.
    """
    features = EfficientNetLite0Features()
    header = machine.description("dimr_fast", "csrc", "kernels") | {
        "weights_sha256": sha256_of_named(trained.model.state_dict()),
        "count": count,
        "recipe": features.recipe,
        **({"sampling": sampling} if sampling else {}),
    }
    rows = _earlier_rows(out, header)
    labels = balanced_labels(count, len(trained.classes))
    with torch.inference_mode():
        reference = compute_statistics(features, TensorImages(load_tiles().val_images, "held out"))
        for point in points:
            stored = json.loads(json.dumps(point))
            if any(stored.items() <= row.items() for row in rows):
                continue
            draw = sampler(trained, sampling or {}, point)
            rows.append(point | score(draw, labels, features, reference))
            write_json(out, header | {"rows": rows})
            print(rows[-1], flush=True)
    return header | {"rows": rows}


def main() -> None:
    parser = argument_parser(__doc__, "sampling_curve.json")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    arguments = parser.parse_args()
    trained = load_model(arguments.checkpoint)
    report = score_points(trained, arguments.count, arguments.out, points())
    if arguments.rounds:
        write_json(arguments.out, report | {"rates": rates(trained, arguments.rounds)})


def _earlier_rows(path: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a results file of the same weights, features, count and sampling."""
    if not path.is_file():
        return []
    earlier = json.loads(path.read_text())
    same = ("weights_sha256", "count", "recipe", "sampling")
    return earlier["rows"] if all(earlier.get(name) == header.get(name) for name in same) else []


if __name__ == "__main__":
    main()
