"""Versions of optional packages.

They are read once in a process: for a package installed since, call `why_not.cache_clear()` and
`version.cache_clear()`.
"""

import functools
import importlib
from importlib import metadata


@functools.cache
def version(package: str) -> tuple[str, tuple[int, ...]]:
    """Return the version of `package` as written and as numbers: "2.8.3+cu12" and (2, 8, 3).

    Raises ImportError if the package is not installed.
    """
    written = metadata.version(package)
    digits = (part for part in written.split("+")[0].split(".") if part.isdigit())
    return written, tuple(map(int, digits))


@functools.cache
def why_not(
    package: str, module: str, first: tuple[int, ...], last: tuple[int, ...] | None = None
) -> str | None:
    """Return why `module` of `package` cannot be used, or None if it can.

    It must import and have a version from `first` on and, if given, before `last`.
    """
    try:
        importlib.import_module(module)
        written, numbers = version(package)
    except (ImportError, OSError) as error:  # OSError: the compiled library does not load
        return f"{package} does not import: {error}"
    if numbers < first or (last is not None and numbers >= last):
        lowest = ".".join(map(str, first))
        bounds = (
            f"from {lowest} to before {'.'.join(map(str, last))}" if last else f"{lowest} or later"
        )
        return f"it needs {package} {bounds}, found {written}"
    return None
