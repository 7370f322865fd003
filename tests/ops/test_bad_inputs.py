"""Thousands of random calls with bad inputs in a separate process, which must survive them."""

import os
import subprocess
import sys

import pytest

from dimr_fast import _extension
from tests.support.paths import ROOT

CALLS = 5_000


@pytest.mark.slow
def test_bad_inputs_are_refused_or_computed_correctly():
    if _extension.why_not("cpu") is not None:
        pytest.skip(f"cpu library: {_extension.why_not('cpu')}")
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.bad_inputs", str(CALLS)]
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=1200
    )
    last = done.stdout[-2000:].splitlines()[-1:]
    assert done.returncode == 0, f"exit {done.returncode} at {last}:\n{done.stderr[-6000:]}"
    assert last[0].startswith("bad inputs: {'bare answered': ")
