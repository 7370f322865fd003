"""What `torch.compile` is told of functions, without the import of Dynamo.

Importing Dynamo takes much of the time in which a command starts; most jobs never need it.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])
P = ParamSpec("P")
T = TypeVar("T")


def constant_result(function: F) -> F:
    """Make `torch.compile` call a function when it traces it, and keep its result as a constant.

    The mark is that of `torch.compiler.assume_constant_result`, which imports Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def not_compiled(reason: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator of functions that `torch.compile` calls as they are, for this reason.

    `torch.compiler.disable` does the same but imports Dynamo at once; here it is called while
    `torch.compile` traces.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        disabled: list[Callable[P, T]] = []

        @constant_result
        def disable() -> bool:
            if not disabled:
                disabled.append(torch.compiler.disable(function, reason=reason))
            return True

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            if torch.compiler.is_compiling() and disable():
                return disabled[0](*args, **kwargs)
            return function(*args, **kwargs)

        return wrapper

    return decorate
