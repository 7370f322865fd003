"""Score the packaged model's samples over the strength of guidance and the times it is applied.

    python -m benchmarks.model.guidance [--count 768] [--checkpoint FILE] [--out FILE]

Every point draws the same balanced classes from the same noise with the same solver and number of
steps, and scores them as `benchmarks.model.sampling_curve` does. A run that was interrupted goes
on. `evaluations` are those of one image: guidance takes a second one at a time where it is applied.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.model.sampling_curve import earlier_rows, score
from benchmarks.utils import machine
from benchmarks.utils.files import RESULTS
from dimr_fast.checkpoint import demo_model, load_model
from dimr_fast.data.tiles import load_tiles
from dimr_fast.evaluation import EfficientNetLite0Features, TensorImages, compute_statistics
from dimr_fast.utils.files import write_json
from dimr_fast.utils.tensors import sha256_of_named

SOLVER = {"solver": "dpm++2m", "spacing": "log_snr", "steps": 8}
STRENGTHS = (0.25, 0.5, 1.0)
INTERVALS = ((0.0, 1.0), (0.0, 0.8), (0.2, 1.0), (0.2, 0.8), (0.0, 0.5), (0.5, 1.0))
KEYS = ("guidance", "guidance_interval")


def points() -> Iterator[dict[str, Any]]:
    """Yield the settings of the points: without guidance, then strength by strength."""
    yield {"guidance": 0.0, "guidance_interval": (0.0, 1.0)}
    for values in itertools.product(STRENGTHS, INTERVALS):
        yield dict(zip(KEYS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=demo_model())
    parser.add_argument("--count", type=int, default=768)
    parser.add_argument("--out", type=Path, default=RESULTS / "guidance.json")
    arguments = parser.parse_args()
    features = EfficientNetLite0Features()
    trained = load_model(arguments.checkpoint)
    header = machine.description("dimr_fast", "csrc", "kernels") | {
        "weights_sha256": sha256_of_named(trained.model.state_dict()),
        "count": arguments.count,
        "recipe": features.recipe,
        "sampling": SOLVER,
    }
    rows = earlier_rows(arguments.out, header)
    done = {(row["guidance"], *row["guidance_interval"]) for row in rows}
    with torch.inference_mode():
        reference = compute_statistics(features, TensorImages(load_tiles().val_images, "held out"))
        for point in points():
            if (point["guidance"], *point["guidance_interval"]) not in done:
                row = score(trained, features, reference, arguments.count, SOLVER | point)
                rows.append({name: row[name] for name in row if name not in SOLVER})
                write_json(arguments.out, header | {"rows": rows})
                print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
