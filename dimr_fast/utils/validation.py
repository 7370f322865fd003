"""Checks of arguments and settings, and the typed loading of settings."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor

T = TypeVar("T")


def require(ok: bool, argument: str, value: object, expected: str) -> None:
    """Raise ValueError unless `ok`, naming the argument, its value and what was expected."""
    if not ok:
        raise ValueError(f"{argument}: got {value!r}, expected {expected}")


def require_fields(settings: object, **checks: tuple[bool, str]) -> None:
    """Check fields of a dataclass: each name maps to (condition holds, expected value in words)."""
    for name, (ok, expected) in checks.items():
        require(ok, name, getattr(settings, name), expected)


def check_tensors(**values: object) -> None:
    """Raise TypeError naming a value that is no tensor."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")


def check_seed(seed: int) -> tuple[bool, str]:
    """Return the check of a seed for `require_fields`: torch takes seeds of 64 bits."""
    return 0 <= seed < 2**64, f"0..{2**64 - 1}"


def text_settings(cls: type[Any]) -> set[str]:
    """Return the names of the fields of a dataclass that are text: names, paths and choices."""

    found = set()
    for name, kind in get_type_hints(cls).items():
        if type(None) in get_args(kind):
            kind = get_args(kind)[0]
        if kind in (str, Path) or get_origin(kind) is Literal:
            found.add(name)
    return found


def load_settings(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build the dataclass `cls` from plain values (YAML or JSON), converted to its fields' types.

    Numbers may be text ("1e-4"), "none" stands for None where a field allows it, lists become
    tuples, and a `~` at the start of a path becomes the home folder. Raises ValueError naming a
    setting that is unknown or of another type.
    """
    # Here, because nothing else of the package needs it.
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    hints = get_type_hints(cls)
    # Paths and names may look like numbers.
    lenient = ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False)
    typed = {}
    for name, value in values.items():
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1)
            hint = f"; {near[0]}?" if near else ""
            raise ValueError(
                f"{name}: got an unknown setting, expected one of {cls.__name__}'s{hint}"
            )
        kind = hints[name]
        if isinstance(value, str) and value.lower() == "none" and type(None) in get_args(kind):
            value = None
        # pydantic would take true for 1 and 1 for true.
        require(isinstance(value, bool) == (kind is bool), name, value, _in_words(kind))
        if Path in (kind, *get_args(kind)) and value is not None:
            value = os.path.expanduser(str(value))
        try:
            typed[name] = TypeAdapter(kind, config=lenient).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{name}: got {value!r}, expected {_in_words(kind)}") from error
    return cls(**typed)


def _in_words(kind: Any) -> str:
    """Describe a type for an error message."""
    names = {int: "a whole number", float: "a finite number", bool: "true or false"}
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if get_origin(kind) is tuple:
        return "a list" if arguments[-1] is ... else f"a list of {len(arguments)}"
    if type(None) in arguments:
        return f"{_in_words(arguments[0])} or none"
    return names.get(kind, "text")
