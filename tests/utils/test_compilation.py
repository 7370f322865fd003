"""What `torch.compile` is told of functions."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dimr_fast.utils.compilation import constant_result, not_compiled


def test_the_mark_of_a_constant_result_is_that_of_torch() -> None:
    def one() -> int:
        return 1

    def other() -> int:
        return 1

    torch.compiler.assume_constant_result(other)
    assert vars(constant_result(one)) == vars(other) != {}


@pytest.mark.versions
def test_what_is_not_compiled_is_called_as_it_is() -> None:
    compiling = []

    @not_compiled("it counts its calls")
    def double(x: torch.Tensor) -> torch.Tensor:
        compiling.append(torch.compiler.is_compiling())
        return 2 * x

    def step(x: torch.Tensor) -> torch.Tensor:
        return double(x + 1) - 1

    x = torch.arange(3.0)
    assert torch.equal(step(x), 2 * x + 1)
    compiled = torch.compile(step, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(x), 2 * x + 1)
    assert compiling == [False] * 3
    torch.compiler.reset()  # otherwise a graph with a break would come from the cache
    with pytest.raises(RuntimeError, match="it counts its calls"):
        torch.compile(step, backend="eager", fullgraph=True)(x)


def test_sampling_does_not_import_dynamo(tmp_path: Path) -> None:
    """The import would be much of the time of a short command."""
    words = ["sample", "--per-class", "1", "--steps", "1", "--device", "cpu", "--formats", "png"]
    code = f"""
import sys
from dimr_fast.cli import main
assert main({[*words, "--output", str(tmp_path / "out")]}) == 0
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out").rglob("*.png"))
