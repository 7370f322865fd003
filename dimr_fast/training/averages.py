"""Averages of the weights over a run, of any length: kept on the way, combined afterwards.

A power-function average at step t weighs the weights of step τ by `(γ + 1)·τ^γ/t^(γ+1)`. Its length
is relative: the standard deviation of τ, as a fraction of t. A run keeps averages of two lengths,
and stores them at times; a linear combination of these is an average of any other length, up to an
error that is small where the length is not far outside those kept.

Source: Karras et al. 2024, arXiv 2312.02696, section 3 and appendix C.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from dimr_fast.checkpoint import load_checkpoint
from dimr_fast.errors import CheckpointError

LENGTHS = (0.05, 0.1)
"""Of the averages that a run keeps, as in the paper."""
LONGEST = 0.28
"""Slightly below 1/√12, the length of the mean of all steps."""
AVERAGES = "averages"
"""Folder of a run with a file of averages for each step at which they were stored."""
AVERAGE_PREFIX = "average."
_NO_TENSOR = "/"  # no name of a tensor begins with it


def prefix_of(length: float) -> str:
    """Return the beginning of the names of an average's tensors."""
    return f"{AVERAGE_PREFIX}{length:g}."


@functools.cache
def exponent(length: float) -> float:
    """Return γ of a length. Raises ValueError unless 0 < length < 0.28."""
    if not 0 < length < LONGEST:
        raise ValueError(f"length: got {length}, expected 0 < length < {LONGEST}")
    # length² = (γ + 1)/((γ + 2)²·(γ + 3)), multiplied out.
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def decay_of(length: float, step: int) -> float:
    """Return the decay with which the average after `step` ≥ 1 steps follows the one before."""
    return float((1 - 1 / step) ** (exponent(length) + 1))


@dataclass(frozen=True)
class Average:
    """An average after `step` ≥ 1 steps, by its relative length."""

    length: float
    step: int


def coefficients(kept: Sequence[Average], wanted: Average) -> list[float]:
    """Return the factors of the kept averages whose sum is nearest to the wanted average.

    Nearest in the weights of the steps, by least squares, with steps taken as continuous. The
    factors add up to 1: what all steps have in common is far larger than their differences.
    """

    def product(one: Average, other: Average) -> float:
        """Return the integral of the product of the weights of the steps, by closed form."""
        a, b = exponent(one.length), exponent(other.length)
        first, last = sorted(((one.step, a), (other.step, b)))
        # All steps as fractions of the later one, so that no power overflows.
        fraction = first[0] / last[0]
        return float((a + 1) * (b + 1) / ((a + b + 1) * last[0]) * fraction ** last[1])

    gram = np.array([[product(one, other) for other in kept] for one in kept])
    right = np.array([product(one, wanted) for one in kept])
    # The first factor is 1 minus the others, so these multiply differences from the first average.
    differences = gram[1:, 1:] - gram[1:, :1] - gram[:1, 1:] + gram[0, 0]
    # Averages of neighbouring steps are nearly the same, so the system is nearly singular.
    others, *_ = np.linalg.lstsq(
        differences, right[1:] - right[0] - gram[1:, 0] + gram[0, 0], rcond=1e-12
    )
    return [float(1 - others.sum()), *map(float, others)]


def average_weights(checkpoint: Path, length: float, step: int | None = None) -> dict[str, Tensor]:
    """Return the weights of a run, averaged over a relative length, in float32.

    The average ends at `step`, one at which averages were stored; by default at the checkpoint's.
    It is combined from the averages in the checkpoint and from those in the folder `averages`
    beside it, up to that step. Raises ValueError for a length out of range or a step without
    averages, and CheckpointError if the run kept none, or if a file is unusable or of another run.
    """
    exponent(length)
    files = sorted((checkpoint.parent / AVERAGES).glob("*.safetensors"))
    _, metadata = load_checkpoint(checkpoint, _NO_TENSOR)
    if not (metadata.get("recipe") or {}).get("average_steps") or not metadata.get("step"):
        raise CheckpointError(
            f"{checkpoint}: its run kept no averages: train with average_steps, the interval"
        )
    end = int(metadata["step"])
    stored = {end: checkpoint}
    for file in files:
        _, other = load_checkpoint(file, _NO_TENSOR)
        if other.get("recipe") != metadata["recipe"]:
            raise CheckpointError(f"{file}: is of another run than {checkpoint}")
        # Later files are from before the run was reset to this checkpoint.
        if other["step"] < end:
            stored[int(other["step"])] = file
    last = end if step is None else step
    if last not in stored:
        raise ValueError(f"step: got {last}, expected one with averages: {sorted(stored)}")
    # The nearest first, as `coefficients` gives the first the largest factor.
    steps = sorted((at for at in stored if at <= last), reverse=True)
    kept = [Average(of, at) for at in steps for of in LENGTHS]
    factors = iter(coefficients(kept, Average(length, last)))
    total: dict[str, Tensor] = {}
    for at in steps:
        for of in LENGTHS:
            _accumulate(total, stored[at], prefix_of(of), next(factors))
    return {name: value.float() for name, value in total.items()}


def _accumulate(total: dict[str, Tensor], file: Path, prefix: str, factor: float) -> None:
    """Add the tensors of an average times a factor."""
    tensors, _ = load_checkpoint(file, prefix)
    if not tensors:
        raise CheckpointError(f"{file}: has no tensors {prefix}…")
    for name, tensor in tensors.items():
        name = name.removeprefix(prefix)
        # The factors are large and of both signs, so the sum needs more digits.
        value = tensor.double() * factor
        total[name] = total[name] + value if name in total else value
