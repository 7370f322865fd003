"""Peak memory of this process from a chosen moment on.

`ru_maxrss` is the peak since the process began, and a new program inherits that of its parent: a
larger earlier peak would hide what a test wants to see.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest


def memory_from_here() -> Callable[[], int]:
    """Return a function that gives the bytes by which the process has grown since, at its peak.

    Skips the test where the system is not Linux, or its kernel cannot reset the peak.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is in use now
    except OSError as error:
        pytest.skip(f"this system cannot reset the peak of a process's memory ({error})")
    before = _peak()
    return lambda: _peak() - before


def _peak() -> int:
    (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    return 1024 * int(kilobytes)
