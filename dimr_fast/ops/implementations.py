"""Which implementation of an operator runs, and why another would not."""

from collections.abc import Callable, Mapping

import torch

WhyNot = Callable[[torch.Tensor], str | None]

OPERATORS: dict[str, "Implementations"] = {}
"""Every operator's implementations by operator name; filled as `dimr_fast.ops` is imported."""


def _always(x: torch.Tensor) -> str | None:
    return None


class Implementations:
    """The implementations of one operator, in the order in which "auto" prefers them.

    Each is given as a function of the operator's first input that returns None where the
    implementation is usable and otherwise the reason why not. It may look at device, dtype and
    shape only, never at values. "reference" (plain PyTorch) is always there, and last.

    `slower` says likewise where "auto" passes over an implementation that could run. `example` is
    the shape of a typical first input, for reports.
    """

    def __init__(
        self,
        operator: str,
        *,
        example: tuple[int, ...] = (2, 256, 64),
        slower: Mapping[str, WhyNot] | None = None,
        **why_not: WhyNot,
    ) -> None:
        self.operator = operator
        self.example = example
        self._slower = dict(slower or {})
        self._why_not = {**why_not, "reference": _always}
        OPERATORS[operator] = self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._why_not)

    def why_not(self, implementation: str, x: torch.Tensor) -> str | None:
        """The reason why `implementation` cannot run on `x`, or None where it can."""
        if implementation not in self._why_not:
            raise ValueError(
                f"implementation: got {implementation!r}, but {self.operator} has "
                f"{', '.join(map(repr, ('auto', *self.names)))}"
            )
        return self._why_not[implementation](x)

    def why_not_auto(self, implementation: str, x: torch.Tensor) -> str | None:
        """The reason why "auto" would not choose `implementation` on `x`, better ones aside."""
        reason = self.why_not(implementation, x)
        return self._slower.get(implementation, _always)(x) if reason is None else reason

    def select(self, implementation: str, x: torch.Tensor) -> str:
        """The implementation to run on `x`; ValueError where a named one is unusable."""
        if implementation == "auto":
            return next(name for name in self.names if self.why_not_auto(name, x) is None)
        reason = self.why_not(implementation, x)
        if reason is not None:
            raise ValueError(
                f"implementation: {implementation!r} of {self.operator} cannot run here: {reason}"
            )
        return implementation
