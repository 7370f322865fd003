"""Score a run's averages of the weights, over length and phase, and as guides (autoguidance).

    python -m benchmarks.model.averages --checkpoint RUN/checkpoint.safetensors [--count 768]

The run must have kept averages (`average_steps`). A phase is a fraction of the run: its averages
are those that ended there. A guide is an average of an earlier phase: the prediction is
`main + strength·(main − guide)`, both conditional (Karras et al. 2024, arXiv 2406.02507). All
points have the same classes, noise and solver; a run of this script that was interrupted goes on.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.model.guidance import SOLVER
from benchmarks.model.sampling_curve import argument_parser, sampler_of, score_points
from dimr_fast.checkpoint import TrainedModel, load_checkpoint, load_model
from dimr_fast.diffusion import Autoguided
from dimr_fast.sampling import ImageSampler
from dimr_fast.training.averages import average_weights

LENGTHS = (0.02, 0.04, 0.07, 0.1, 0.14, 0.2)
PHASES = (1.0, 0.5)
GUIDES = ((0.25, 0.1), (0.5, 0.1))
"""Phases and lengths of the averages that guide the one at the end of length `GUIDED`."""
GUIDED = 0.07
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 3.0)


def points() -> Iterator[dict[str, Any]]:
    """Yield the averages without a guide, then the guided ones."""
    for phase in PHASES:
        for length in LENGTHS:
            yield {"phase": phase, "length": length, "guide": None, "strength": 0.0}
    for guide in GUIDES:
        for strength in STRENGTHS:
            yield {"phase": 1.0, "length": GUIDED, "guide": guide, "strength": strength}


def sampler_of_averages(
    checkpoint: Path,
) -> Callable[[TrainedModel, dict[str, Any], dict[str, Any]], ImageSampler]:
    """Return a function that makes the sampler of a point, as `score_points` takes one."""
    _, metadata = load_checkpoint(checkpoint, "ema.")
    stored = sorted(
        {int(path.stem) for path in (checkpoint.parent / "averages").glob("*.safetensors")}
        | {int(metadata["step"])}
    )

    def sampler(
        trained: TrainedModel, sampling: dict[str, Any], point: dict[str, Any]
    ) -> ImageSampler:
        def average(phase: float, length: float) -> ImageSampler:
            step = min(stored, key=lambda at: abs(at - phase * metadata["step"]))
            trained.model.load_state_dict(average_weights(checkpoint, length, step))
            return sampler_of(trained, sampling, {})

        draw = average(point["phase"], point["length"])
        if point["guide"] is not None:
            guide = average(*point["guide"])
            draw.network = Autoguided(draw.network, guide.network, point["strength"])
        return draw

    return sampler


def main() -> None:
    parser = argument_parser(__doc__, "averages.json")
    arguments = parser.parse_args()
    trained = load_model(arguments.checkpoint)
    score_points(
        trained,
        arguments.count,
        arguments.out,
        points(),
        {**SOLVER, "guidance": 0.0},
        sampler_of_averages(arguments.checkpoint),
    )


if __name__ == "__main__":
    main()
