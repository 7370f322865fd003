"""`attention` by Triton (interpreted without a GPU) and by PyTorch, against the reference."""

import contextlib
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dimr_fast import ops, reference
from tests.support.oracle import (
    DEVICE,
    assert_as_accurate,
    seeded,
    skip_module_without_triton,
    with_gradients,
)
from tests.support.package_copy import copy_package

skip_module_without_triton()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

Function = Callable[[torch.Tensor], torch.Tensor]


def by(implementation: str, heads: int) -> Function:
    return lambda qkv: ops.attention(qkv, heads, implementation=implementation)


def ours(heads: int) -> Function:
    return by("triton", heads)


def plain(heads: int) -> Function:
    return lambda qkv: reference.attention(qkv, heads)


def packed(images: int, tokens: int, heads: int, head_dim: int) -> torch.Tensor:
    return seeded(images, tokens, 3 * heads * head_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 4, 12, 15, 32, 48, 60, 64, 72, 80, 96, 128])
def test_every_head_dim(head_dim: int, dtype: torch.dtype) -> None:
    qkv = packed(1, 35, 2, head_dim)
    assert_as_accurate(with_gradients(ours(2)), with_gradients(plain(2)), qkv, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("images", "tokens", "heads", "head_dim"),
    [
        (2, 1, 2, 60),
        (1, 2, 3, 12),
        (2, 16, 1, 60),
        (1, 17, 2, 72),
        (1, 33, 3, 36),
        (1, 64, 2, 20),
        (2, 65, 2, 60),
        (1, 70, 1, 128),
        (1, 257, 1, 60),
        (1, 257, 1, 72),
    ],
)
def test_forward_and_gradients(
    images: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    qkv = packed(images, tokens, heads, head_dim)
    assert_as_accurate(with_gradients(ours(heads)), with_gradients(plain(heads)), qkv, dtype=dtype)


@settings(max_examples=20, deadline=None)
@given(
    images=st.integers(0, 2),
    tokens=st.integers(0, 70),
    heads=st.integers(1, 3),
    quarter=st.integers(1, 32),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(images: int, tokens: int, heads: int, quarter: int, dtype: torch.dtype) -> None:
    qkv = packed(images, tokens, heads, 4 * quarter)
    assert_as_accurate(with_gradients(ours(heads)), with_gradients(plain(heads)), qkv, dtype=dtype)


def in_tiles_of(size: int) -> contextlib.AbstractContextManager[Any]:
    """Use large tiles in the interpreter, whose time grows with their number.

    A GPU uses its own configuration: compiling a tile of 1024×1024 for it would take minutes.
    """
    from dimr_fast.kernels.configuration import trial

    stack = contextlib.ExitStack()
    if DEVICE == "cpu":
        for kernel in ("attention_fwd", "attention_bwd_dq", "attention_bwd_dkdv"):
            tiles = {"BLOCK_M": size, "BLOCK_N": size}
            stack.enter_context(trial(kernel, tiles, torch.device(DEVICE)))
    return stack


def test_a_long_sequence() -> None:
    with in_tiles_of(1024):
        assert_as_accurate(ours(1), plain(1), packed(1, 4097, 1, 4), dtype=torch.float16)


def test_gradients_of_a_long_sequence() -> None:
    qkv = packed(1, 1025, 1, 8)
    with in_tiles_of(256):
        assert_as_accurate(
            with_gradients(ours(1)), with_gradients(plain(1)), qkv, dtype=torch.float16
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [35, 65])
def test_the_parts_of_the_softmax(tokens: int, dtype: torch.dtype) -> None:
    def theirs(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, _ = qkv.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT).to(torch.promote_types(qkv.dtype, torch.float32))
        return plain(2)(qkv), (scores / math.sqrt(q.shape[-1])).logsumexp(-1)

    def kept(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, parts = torch.ops.dimr_fast.attention_fwd.triton(qkv, 2)
        top, share = parts.unbind(2)
        return out, (top - share.log2()) * math.log(2)

    assert_as_accurate(kept, theirs, packed(2, tokens, 2, 60), dtype=dtype)


def alike(score: float) -> torch.Tensor:
    """Return qkv whose scores are all near `score`, a shift that must not change the softmax."""
    qkv = packed(1, 65, 1, 16).unflatten(-1, (3, 16)).clone()
    qkv[:, :, 0, 0], qkv[:, :, 1, 0] = 64, score / 16
    return qkv.flatten(2)


def one_hot() -> torch.Tensor:
    """Return qkv for which each token attends to itself only: one-hot keys, large queries."""
    tokens = torch.eye(35, 36, device=DEVICE)
    return torch.cat([1000 * tokens, tokens, seeded(35, 36)], 1)[None]


ADVERSARIAL = {
    "scores near 1000": alike(1000),
    "scores near -1000": alike(-1000),
    "scores from -1000 to 1000": 16 * packed(1, 65, 1, 16),
    "one-hot rows": one_hot(),
    "zeros": torch.zeros(1, 35, 36, device=DEVICE),
    "all tokens alike": packed(1, 1, 1, 12).expand(1, 35, -1),
    "tiny": 1e-7 * packed(1, 35, 1, 12),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_adversarial_rows(case: str, dtype: torch.dtype) -> None:
    qkv = ADVERSARIAL[case]
    for result in with_gradients(ours(1))(qkv.to(dtype)):
        assert result.isfinite().all()
    assert_as_accurate(with_gradients(ours(1)), with_gradients(plain(1)), qkv, dtype=dtype)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "without the class token": lambda x: x[:, 1:],
    "permuted": lambda x: x.transpose(0, 1),
    "every other column": lambda x: x[..., ::2],
    "a slot of a buffer": lambda x: x.unflatten(-1, (2, -1))[..., 1, :],
    "expanded": lambda x: x[:1].expand(4, -1, -1),
    "rows an odd number of elements apart": lambda x: x.flatten()[:738].unflatten(0, (6, 123))[
        None, :, 1:97
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout: str) -> None:
    qkv = LAYOUTS[layout](seeded(3, 6, 192))
    expected = with_gradients(plain(2))(qkv.contiguous())
    for actual, truth in zip(with_gradients(ours(2))(qkv), expected, strict=True):
        torch.testing.assert_close(actual, truth)


def test_an_expanded_gradient() -> None:
    qkv = packed(2, 5, 2, 8).requires_grad_()
    actual, expected = (torch.autograd.grad(f(qkv).sum(), qkv)[0] for f in (ours(2), plain(2)))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("tokens", [65, 70])
def test_gradients_are_deterministic(tokens: int) -> None:
    first, second = (with_gradients(ours(2))(packed(1, tokens, 2, 60)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.versions
def test_fullgraph_forward_and_backward_equal_eager() -> None:
    qkv = packed(2, 5, 2, 12)
    eager = with_gradients(ours(2))(qkv)
    for backend in ("aot_eager", "inductor"):
        graph = torch.compile(ours(2), fullgraph=True, backend=backend)
        for actual, truth in zip(with_gradients(graph)(qkv), eager, strict=True):
            torch.testing.assert_close(actual, truth)


def test_operators_pass_opcheck() -> None:
    qkv, out, parts = packed(2, 5, 2, 12), seeded(2, 5, 24), seeded(2, 2, 2, 5)
    torch.library.opcheck(torch.ops.dimr_fast.attention_fwd.triton, (qkv, 2))
    torch.library.opcheck(torch.ops.dimr_fast.attention_bwd.triton, (out, qkv, out, parts, 2))


@pytest.mark.parametrize("tokens", [1, 35, 65])
def test_no_output_is_left_unwritten(poisoned_memory: None, tokens: int) -> None:
    qkv = packed(2, tokens, 2, 12).half()
    for result in (
        *with_gradients(ours(2))(qkv),
        torch.ops.dimr_fast.attention_fwd.triton(qkv, 2)[1],
    ):
        assert result.isfinite().all()


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: ours(1)(packed(1, 2, 1, 132)), "head_dim up to 128, not 132"),
    (lambda: ours(1)(packed(1, 2, 1, 8).double()), "'triton' of attention.*float64"),
    (lambda: ours(2)(packed(1, 2, 1, 4)[..., :11]), r"qkv: got shape \(1, 2, 11\)"),
    (lambda: ours(2)(packed(1, 2, 2, 4)[0]), r"qkv: got shape \(2, 24\)"),
    (lambda: ours(0)(packed(1, 2, 2, 4)), "qkv: got shape"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_names_the_argument(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_addresses_past_32_bits() -> None:
    """Tokens are far apart: the last begins more than 2³¹ elements after the first."""
    far = (2**31 + 4096) // 2
    buffer = torch.empty(2 * far + 24, dtype=torch.float16, device=DEVICE)
    far_apart = buffer.as_strided((1, 3, 24), (0, far, 1))

    def from_far(qkv: torch.Tensor) -> torch.Tensor:
        out, parts = torch.ops.dimr_fast.attention_fwd.triton(far_apart.copy_(qkv), 2)
        return torch.ops.dimr_fast.attention_bwd.triton(out, far_apart, out, parts, 2)

    def from_near(qkv: torch.Tensor) -> torch.Tensor:
        leaf = qkv.detach().requires_grad_()
        out = plain(2)(leaf)
        return torch.autograd.grad(out, leaf, out.detach())[0]

    assert_as_accurate(from_far, from_near, packed(1, 3, 2, 4), dtype=torch.float16)


by_pytorch = pytest.mark.parametrize("name", ["bmm", "sdpa"])


@by_pytorch
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("images", "tokens", "heads", "head_dim"),
    [(2, 257, 16, 60), (1, 257, 16, 72), (3, 1, 2, 8), (2, 65, 5, 32), (0, 9, 2, 8)],
)
def test_pytorch_is_as_accurate_as_the_reference(
    images: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, name: str
) -> None:
    qkv = packed(images, tokens, heads, head_dim)
    assert_as_accurate(by(name, heads), plain(heads), qkv, dtype=dtype)


@by_pytorch
def test_gradient_by_pytorch_equals_the_reference(name: str) -> None:
    qkv, grad = packed(2, 17, 4, 12).double().requires_grad_(), seeded(2, 17, 48).double()
    actual, expected = (torch.autograd.grad(f(qkv), qkv, grad)[0] for f in (by(name, 4), plain(4)))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x[:, 1:], lambda x: x.transpose(0, 1)])
def test_gradient_of_batched_products_in_each_precision(
    dtype: torch.dtype, layout: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    qkv = packed(5, 33, 4, 12)
    ours, theirs = (with_gradients(lambda x, f=f: f(layout(x))) for f in (by("bmm", 4), plain(4)))
    assert_as_accurate(ours, theirs, qkv, dtype=dtype)


@pytest.mark.versions
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_batched_products_compile_as_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    run = torch.compile(by("bmm", 2), fullgraph=True, backend=backend)
    # Inductor does not round the attention weights that backward computes again.
    ours, theirs = with_gradients(run), with_gradients(plain(2))
    assert_as_accurate(ours, theirs, packed(2, 9, 2, 8), dtype=torch.bfloat16)


WITHOUT_CPU_LIBRARY = """
import torch
from dimr_fast import ops
from tests.support.oracle import DEVICE, seeded

attention = ops.OPERATORS["attention"]
assert attention.why_not("cpu", torch.zeros(1, 2, 24)) is not None
assert attention.select("auto", torch.zeros(1, 2, 24)) == "sdpa"
assert attention.select("auto", torch.zeros(1, 2, 3, 1, 6)) == "sdpa"
few, many = (torch.zeros(1, n, 3, 1, 8, dtype=torch.bfloat16) for n in (257, 258))
assert attention.select("auto", few) == "bmm"
assert attention.select("auto", many) == "sdpa"
assert attention.why_not("triton", torch.zeros(1, 2, 3, 1, 8, device=DEVICE)) is None
qkv = seeded(1, 2, 18)
expected = ops.attention(qkv, 1, implementation="reference")
torch.testing.assert_close(ops.attention(qkv, 1), expected)
"""


def test_auto_without_the_cpu_library(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_CPU_LIBRARY]
    environment = copy_package(tmp_path)
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_tiles_waste_as_little_as_two_powers_of_two_can() -> None:
    from dimr_fast.kernels.attention_tiles import tile_widths

    sizes = (0, 16, 32, 64, 128)
    for head_dim in range(4, 129, 4):
        widths = tile_widths(head_dim)
        assert widths[0] % 16 == 0
        assert sum(widths) == min(a + b for a in sizes for b in sizes if a + b >= head_dim)
    assert [tile_widths(d) for d in (60, 72, 128)] == [(64,), (64, 16), (128,)]
    assert [tile_widths(d, most=1) for d in (4, 60, 72)] == [(16,), (64,), (128,)]
