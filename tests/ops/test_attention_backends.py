"""Attention by other packages, tested with fakes that have the packages' signatures.

The fakes have the signatures of flash-attn 2.8.3 and xformers 0.0.35, and are compared with the
real packages where these are installed.
"""

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dimr_fast import ops, reference
from dimr_fast.ops import attention_backends as backends
from tests.support.oracle import assert_as_accurate, seeded, with_gradients
from tests.support.versions import forget_versions

CALLS: list[dict[str, Any]] = []


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    CALLS.append(locals())
    assert qkv.dim() == 5
    assert qkv.shape[2] == 3
    assert qkv.dtype in (torch.bfloat16, torch.float16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=softmax_scale)
    return out.transpose(1, 2)


def memory_efficient_attention(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    CALLS.append(locals())
    for tensor in (query, key, value):
        assert tensor.dim() == 4
        assert tensor.stride(-1) == 1
        # what its kernels check: every head is aligned to 16 bytes
        assert tensor.shape[-1] * tensor.element_size() % 16 == 0
        assert tensor.stride(-2) * tensor.element_size() % 16 == 0
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p, scale=scale).transpose(1, 2)


STAND_INS = {
    "flash_attn": ("flash_attn", flash_attn_qkvpacked_func),
    "xformers": ("xformers.ops", memory_efficient_attention),
}


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    for module, function in STAND_INS.values():
        fake = ModuleType(module)
        setattr(fake, function.__name__, function)
        monkeypatch.setitem(sys.modules, module, fake)


def by(backend: Callable[[torch.Tensor], torch.Tensor], heads: int) -> Any:
    return lambda qkv: backend(qkv.unflatten(-1, (3, heads, -1))).flatten(2)


HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("head_dim", [60, 64, 72, 6])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in STAND_INS for dtype in HALF] + [("xformers", torch.float32)],
)
def test_the_adapter_is_as_accurate_as_the_reference(
    stand_ins: None, name: str, head_dim: int, dtype: torch.dtype
) -> None:
    qkv = seeded(2, 9, 3 * 2 * head_dim)
    assert_as_accurate(
        with_gradients(by(getattr(backends, name), 2)),
        with_gradients(lambda x: reference.attention(x, 2)),
        qkv,
        dtype=dtype,
    )
    scale = CALLS[-1]["softmax_scale" if name == "flash_attn" else "scale"]
    assert scale == head_dim**-0.5


def test_flash_attn_is_given_the_packed_projection_itself(stand_ins: None) -> None:
    qkv = seeded(1, 5, 3 * 2 * 60).bfloat16()
    by(backends.flash_attn, 2)(qkv)
    assert CALLS[-1]["qkv"].data_ptr() == qkv.data_ptr()
    assert CALLS[-1]["deterministic"] is False
    torch.use_deterministic_algorithms(True)
    by(backends.flash_attn, 2)(qkv)
    torch.use_deterministic_algorithms(False)
    assert CALLS[-1]["deterministic"] is True


def test_xformers_is_given_views_where_nothing_must_be_padded(stand_ins: None) -> None:
    qkv = seeded(1, 5, 3 * 2 * 64).bfloat16()
    by(backends.xformers, 2)(qkv)
    assert CALLS[-1]["query"].data_ptr() == qkv.data_ptr()
    by(backends.xformers, 2)(seeded(1, 5, 3 * 2 * 60).bfloat16())
    assert CALLS[-1]["query"].shape == (1, 5, 2, 64)


@pytest.mark.parametrize("name", STAND_INS)
def test_the_stand_in_has_the_package_s_signature(name: str) -> None:
    module, function = STAND_INS[name]
    package = pytest.importorskip(module, reason=f"{name} is not installed")
    theirs = inspect.signature(getattr(package, function.__name__)).parameters.values()
    ours = inspect.signature(function).parameters.values()
    for mine, real in zip(ours, theirs, strict=True):
        assert (mine.name, mine.kind, mine.default) == (real.name, real.kind, real.default)


class OnGPU(torch.Tensor):
    """A tensor that claims to be on a GPU."""

    @property
    def is_cuda(self) -> bool:
        return True


def on_gpu(head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(1, 2, 3, 1, head_dim, dtype=dtype).as_subclass(OnGPU)


@pytest.mark.parametrize("name", STAND_INS)
def test_why_not(
    stand_ins: None,
    name: str,
    invented_versions: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    why_not = ops.OPERATORS["attention"].why_not
    package = {"flash_attn": "flash-attn", "xformers": "xformers"}[name]
    capability = [(9, 0)]
    invented_versions |= {"flash-attn": "2.8.3+cu12", "xformers": "0.0.35"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability[0])

    def reason(head_dim: int = 60, dtype: torch.dtype = torch.bfloat16) -> str | None:
        forget_versions()
        return why_not(name, on_gpu(head_dim, dtype))

    assert reason() is None
    assert "it runs on a GPU" in str(why_not(name, torch.zeros(1, 2, 6).half()))
    assert "qkv is float64" in str(reason(dtype=torch.float64))
    assert (reason(dtype=torch.float32) is None) == (name == "xformers")
    assert ("up to 256, not 264" in str(reason(264))) == (name == "flash_attn")
    capability[0] = (7, 5)
    assert "capability 8.0" in str(reason())
    invented_versions[package] = "0.0.1"
    assert "found 0.0.1" in str(reason())
    monkeypatch.setitem(sys.modules, STAND_INS[name][0], None)
    assert f"{package} does not import" in str(reason())


def test_auto_leaves_the_packages_alone() -> None:
    implementations = ops.OPERATORS["attention"]
    for name in STAND_INS:
        assert implementations.why_not_auto(name, torch.zeros(1, 2, 6)) is not None
    names = ("triton", "cpu", "bmm", "sdpa", "flash_attn", "xformers", "reference")
    assert implementations.names == names


@pytest.mark.parametrize("name", STAND_INS)
def test_a_named_package_raises_where_it_cannot_run(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"'{name}' of attention cannot run here: it runs on a GPU"
    ):
        ops.attention(torch.zeros(1, 2, 24, dtype=torch.float16), 1, implementation=name)
