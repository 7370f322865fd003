"""Median and percentiles of measured values."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of a measured quantity."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
        return cls(statistics.median(values), p20, p80)

    def __truediv__(self, other: "Spread") -> "Spread":
        """Return the ratio, with the smallest and largest values that both spreads allow."""
        return Spread(self.median / other.median, self.p20 / other.p80, self.p80 / other.p20)

    def scaled(self, factor: float) -> "Spread":
        """Return the spread multiplied by a positive number."""
        return Spread(self.median * factor, self.p20 * factor, self.p80 * factor)

    def named(self, name: str) -> dict[str, float]:
        """Return the three values for a results file: `name`, `name`_p20 and `name`_p80."""
        return {name: self.median, f"{name}_p20": self.p20, f"{name}_p80": self.p80}

    def __str__(self) -> str:
        return f"{figure(self.median)} ({figure(self.p20)}–{figure(self.p80)})"


def figure(value: float) -> str:
    """Format a number with about three digits."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"
