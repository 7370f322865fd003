"""Targets of the project, and the verdict on each."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from benchmarks.utils.spread import Spread

Results = TypeVar("Results")
NOT_MEASURED, MISSED, MET, AIM_MET = "not measured", "missed", "met", "aim met"


@dataclass(frozen=True)
class Target(Generic[Results]):
    """A quantity with a required value `least` and a desired value `aim`.

    Larger is better if `aim` is larger than `least`, else smaller is better. `measure` finds the
    values of the quantity in results; the worst median counts. `predicted` was written down before
    the first measurement.
    """

    title: str
    least: float
    aim: float
    measure: Callable[[Results], Iterable[Spread]]
    unit: str = "×"
    predicted: float | None = None

    def judge(self, results: Results | None) -> "Judgement":
        """Return the verdict on `results`; without any, the target is not measured."""
        found = [] if results is None else list(self.measure(results))
        sign = 1 if self.aim > self.least else -1
        worst = min(found, key=lambda spread: sign * spread.median, default=None)
        verdict = NOT_MEASURED
        if worst is not None:
            verdict = MET if sign * worst.median >= sign * self.least else MISSED
            if sign * worst.median >= sign * self.aim:
                verdict = AIM_MET
        return Judgement(self, worst, len(found), verdict)

    def required(self) -> str:
        """Return the required value with its direction and unit."""
        return f"{'≥' if self.aim > self.least else '≤'} {self.least:g}{self.unit}"

    def desired(self) -> str:
        """Return the desired value with its unit."""
        return f"{self.aim:g}{self.unit}"


@dataclass(frozen=True)
class Judgement:
    """A target, the worst of `count` measured values (None if none) and the verdict."""

    target: Target
    worst: Spread | None
    count: int
    verdict: str
