"""Score the packaged model's samples over the strength of guidance and the times it is applied.

    python -m benchmarks.model.guidance [--count 768] [--checkpoint FILE] [--out FILE]

Every point draws the same balanced classes from the same noise with the same solver and number of
steps, and scores them as `benchmarks.model.sampling_curve` does. A run that was interrupted goes
on. `evaluations` are those of one image: guidance takes a second one at a time where it is applied.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from benchmarks.model.sampling_curve import argument_parser, score_points
from dimr_fast.checkpoint import load_model

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
    arguments = argument_parser(__doc__, "guidance.json").parse_args()
    trained = load_model(arguments.checkpoint)
    score_points(trained, arguments.count, arguments.out, points(), SOLVER)


if __name__ == "__main__":
    main()
