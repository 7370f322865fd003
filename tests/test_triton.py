"""When Triton's kernels can run, and why not (`dimr_fast.ops._triton`)."""

import sys
from importlib import metadata

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dimr_fast.ops import OPERATORS, _triton

HAVE_TRITON = [name for name, o in OPERATORS.items() if "triton" in o.names]


@pytest.fixture(autouse=True)
def asked_anew() -> None:
    _triton._installed.cache_clear()


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(*shape, dtype=dtype, device="cuda")


def test_which_operators_have_it() -> None:
    assert set(OPERATORS) - set(HAVE_TRITON) == {"depthwise_conv2d"}


@pytest.mark.parametrize("operator", HAVE_TRITON)
def test_auto_takes_it_on_a_gpu_and_not_on_a_cpu(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    operator_ = OPERATORS[operator]
    assert operator_.select("auto", on_gpu(*operator_.example)) == "triton"
    assert operator_.select("auto", torch.empty(operator_.example)) != "triton"


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 3, 4)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "x is on cpu" in str(_triton.why_not(x))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "x is float64" in str(_triton.why_not(x.double()))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))
    monkeypatch.setattr(_triton, "_installed", lambda: None)
    assert "8.0 or later" in str(_triton.why_not(on_gpu(2, 3)))


def test_no_triton_or_an_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "does not import" in str(_triton.why_not(torch.ones(2)))
    _triton._installed.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", torch)
    monkeypatch.setattr(metadata, "version", lambda name: "3.5.1")
    assert "3.6 or later, found 3.5.1" in str(_triton.why_not(torch.ones(2)))
    _triton._installed.cache_clear()
