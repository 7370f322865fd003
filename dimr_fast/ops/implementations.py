"""The choice between the implementations of an operator."""

from collections.abc import Callable, Mapping

import torch

WhyNot = Callable[[torch.Tensor], str | None]
"""A function of an operator's first input: returns the reason against an implementation, or None.

It may look at device, dtype and shape only, never at values.
"""

OPERATORS: dict[str, "Implementations"] = {}
"""The implementations of every operator by its name; filled when `dimr_fast.ops` is imported."""


def never(x: torch.Tensor) -> None:
    """Return None: the implementation can run on every input."""


class Implementations:
    """The implementations of one operator, in the order in which "auto" tries them.

    Each keyword argument names an implementation and gives its `WhyNot`: why it cannot run.
    `slower` maps an implementation that can run to a second `WhyNot`: why "auto" skips it.
    "reference" (plain PyTorch) can always run and comes last. `example` is the shape of a typical
    first input, used in reports.
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
        self._why_not = {**why_not, "reference": never}
        OPERATORS[operator] = self

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the implementations, in the order in which "auto" tries them."""
        return tuple(self._why_not)

    def why_not(self, implementation: str, x: torch.Tensor) -> str | None:
        """Return why `implementation` cannot run on `x`, or None if it can.

        Raises ValueError if the operator has no implementation of that name.
        """
        if implementation not in self._why_not:
            raise ValueError(
                f"implementation: got {implementation!r}, but {self.operator} has "
                f"{', '.join(map(repr, ('auto', *self.names)))}"
            )
        return self._why_not[implementation](x)

    def why_not_auto(self, implementation: str, x: torch.Tensor) -> str | None:
        """Return why "auto" skips `implementation` on `x`, or None if it would choose it.

        Implementations that come earlier in the order are not considered.
        """
        reason = self.why_not(implementation, x)
        return self._slower.get(implementation, never)(x) if reason is None else reason

    def select(self, implementation: str, x: torch.Tensor) -> str:
        """Return the name of the implementation to run on `x`.

        "auto" selects the first that can run and is not skipped. A named implementation is never
        replaced by another one: raises ValueError with the reason if it cannot run on `x`.
        """
        if implementation == "auto":
            return next(name for name in self.names if self.why_not_auto(name, x) is None)
        reason = self.why_not(implementation, x)
        if reason is not None:
            raise ValueError(
                f"implementation: {implementation!r} of {self.operator} cannot run here: {reason}"
            )
        return implementation
