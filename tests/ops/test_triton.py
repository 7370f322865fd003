"""When Triton kernels can run, and the reasons why they cannot."""

import functools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dimr_fast import DiMR, _extension
from dimr_fast.ops import OPERATORS
from tests.support.aot import Launch, compiled, meta
from tests.support.versions import forget_versions

HAVE_TRITON = [name for name, o in OPERATORS.items() if "triton" in o.names]


why_not = functools.partial(OPERATORS["td_rms_norm"].why_not, "triton")


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


def test_a_model_on_a_gpu_runs_on_triton_under_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test the forward on a fake GPU, where autograd's engine cannot run."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    called: set[str] = set()

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func.namespace == "dimr_fast":
                called.add(str(func))
            return func(*args, **(kwargs or {}))

    with torch.device("meta"):
        model = DiMR.from_preset("tiny")
    config = model.config
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model = model.to_empty(device="cuda")
        x = torch.empty(2, config.channels, *config.image_size)
        log_snr, y = torch.empty(2), torch.zeros(2, dtype=torch.int64)
        with Calls():
            model(x, log_snr=log_snr, y=y)
    others = {"rms_norm", *(o for o in HAVE_TRITON if o.endswith("_fp8"))}
    expected = {f"dimr_fast.{o}_fwd.triton" for o in set(HAVE_TRITON) - others}
    if _extension.why_not("cuda") is None:
        expected.add("dimr_fast.depthwise_conv2d_fwd.default")
    assert called == expected


def test_reasons(invented_versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 3, 4)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "x is on cpu" in str(why_not(x))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "x is float64" in str(why_not(x.double()))
    x = on_gpu(2, 3)
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    invented_versions["triton"] = "3.6.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 0))
    assert why_not(x) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))
    assert "8.0 or later" in str(why_not(x))


def test_no_triton_or_an_old_one(
    invented_versions: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "does not import" in str(why_not(torch.ones(2)))
    forget_versions()
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    invented_versions["triton"] = "3.5.1"
    assert "3.6 or later, found 3.5.1" in str(why_not(torch.ones(2)))


def test_an_interpreter_that_fails_is_a_reason(
    invented_versions: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    invented_versions |= {"triton": "3.6.0", "numpy": "2.5.2"}
    reason = "the interpreter of Triton 3.6.0 needs NumPy before 2.4, found 2.5.2"
    assert why_not(torch.ones(2)) == reason
    with pytest.raises(ValueError, match=reason):
        OPERATORS["td_rms_norm"].select("triton", torch.ones(2, 3, 4))
    for name, version in (("triton", "3.7.1"), ("numpy", "2.3.5")):
        with monkeypatch.context() as context:
            context.setitem(invented_versions, name, version)
            forget_versions()
            assert why_not(torch.ones(2)) is None


def aot_launches() -> list[Launch]:
    from dimr_fast.kernels import attention, gated_gelu, td_parameters, td_rms_norm

    fp32 = torch.float32
    launches = []
    for images, rows, width in [(1, 1, 1), (1, 1, 16), (1, 3, 16), (3, 1, 16)]:
        x, scale, rms = (
            meta(images, rows, width),
            meta(1, width, dtype=fp32),
            meta(images, rows, dtype=fp32),
        )
        merged = meta(images, rows, 2 * width)
        launches += [
            Launch("norm", lambda x=x, s=scale: td_rms_norm.launch_fwd(x, x, s, x.dtype)),
            Launch("norm", lambda x=x, s=scale, r=rms: td_rms_norm.launch_bwd(x, x, x, s, r, True)),
            Launch("gate", lambda m=merged: gated_gelu.launch_fwd(m)),
            Launch("gate", lambda m=merged, x=x: gated_gelu.launch_bwd(x, m, True)),
        ]
    vectors = [[meta(1, dtype=fp32)]] * 4
    tau, values = meta(1, dtype=fp32), meta(1, 1, dtype=fp32)
    return [
        *launches,
        Launch("parameters", lambda: td_parameters.launch_fwd(tau, *vectors)),
        Launch("parameters", lambda: td_parameters.launch_bwd(values, tau, *vectors)),
        Launch("attention", lambda: attention.launch_fwd(meta(1, 1, 12), 1)),
        Launch("attention", lambda: attention.launch_fwd(meta(1, 2, 12), 1)),
    ]


@pytest.mark.slow
@pytest.mark.versions
def test_kernels_compile_at_sizes_of_one() -> None:
    """Triton compiles arguments that are 1 as constants, and constants lack some methods.

    The interpreter does not show that. Tests of other operators compile such sizes as well.
    """
    pytest.importorskip("triton", reason="triton is not installed")
    kernels = {kernel.kernel for kernel in compiled("tests.ops.test_triton")}
    assert len(kernels) >= 7
