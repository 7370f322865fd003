"""`td_rms_norm` by Triton (interpreted without a GPU) and by the compiled CPU library."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dimr_fast import ops
from tests.support.aot import TARGETS, Launch, compiled, meta
from tests.support.oracle import DEVICE, Function, assert_as_accurate, seeded, with_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=["triton", "cpu"])
def implementation(request: pytest.FixtureRequest) -> str:
    reason = ops.OPERATORS["td_rms_norm"].why_not(request.param, seeded(1))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(scope="module")
def ours(implementation: str) -> Function:
    return functools.partial(ops.td_rms_norm, implementation=implementation)


def plain(x: torch.Tensor, scale: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    return ops.td_rms_norm(x, scale, residual, implementation="reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("times", ["per image", "shared"])
@pytest.mark.parametrize(
    "shape",
    [(2, 33, 960), (2, 4, 4, 480), (1, 9, 1152), (3, 1, 7), (5, 66), (1, 3, 9000)],
    ids=str,
)
def test_forward_and_gradients(
    ours: Function, shape: tuple[int, ...], times: str, dtype: torch.dtype
) -> None:
    x, residual = 3 * seeded(*shape) + 1, seeded(*shape).flip(0)
    scale = seeded(shape[0] if times == "per image" else 1, shape[-1])
    assert_as_accurate(with_gradients(ours), with_gradients(plain), x, scale, dtype=dtype)
    assert_as_accurate(with_gradients(ours), with_gradients(plain), x, scale, residual, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(torch.zeros(3, 40), id="zeros"),
        pytest.param(torch.full((3, 40), 7.0), id="constant"),
        pytest.param(torch.eye(40)[:3], id="one-hot"),
        pytest.param(torch.eye(40)[:3] * 6e4, id="one-hot and huge"),
        pytest.param(torch.linspace(-1, 1, 120).view(3, 40) * 6e4, id="huge"),
        pytest.param(torch.linspace(-1, 1, 120).view(3, 40) * 1e-7, id="tiny"),
    ],
)
def test_adversarial_rows(ours: Function, rows: torch.Tensor, dtype: torch.dtype) -> None:
    x, scale = rows[None].to(DEVICE), seeded(1, 40)
    result = with_gradients(ours)(x.to(dtype), scale.to(dtype))
    finite = with_gradients(plain)(x.to(dtype), scale.to(dtype))
    for a, b in zip(result, finite, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
    assert_as_accurate(ours, plain, x, scale, dtype=dtype)
    if finite[1].isfinite().all():
        assert_as_accurate(with_gradients(ours), with_gradients(plain), x, scale, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_one(ours: Function, dtype: torch.dtype) -> None:
    """The gradient is the difference of two equal terms: zero except for rounding errors."""
    x, scale = seeded(2, 5, 1).to(dtype), seeded(1, 1).to(dtype)
    assert_as_accurate(ours, plain, x, scale, dtype=dtype)
    _, dx, _ = with_gradients(ours)(x, scale)
    term = 2 * scale.double().abs() / x.double().abs()
    assert (dx.double().abs() <= 4 * torch.finfo(torch.float32).eps * term).all()


@settings(max_examples=25, deadline=None)
@given(
    images=st.integers(0, 3),
    rows=st.integers(0, 20),
    width=st.integers(8, 300),
    shared=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    ours: Function, images: int, rows: int, width: int, shared: bool, dtype: torch.dtype
) -> None:
    x, scale = seeded(images, rows, width), seeded(1 if shared else images, width)
    assert_as_accurate(with_gradients(ours), with_gradients(plain), x, scale, dtype=dtype)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "without the class token": lambda x: x[:, 1:],
    "permuted": lambda x: x.transpose(0, 1),
    "every other column": lambda x: x[..., ::2],
    "a slot of a buffer": lambda x: x.unflatten(-1, (2, -1))[..., 1, :],
    "expanded": lambda x: x[:1].expand(4, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(ours: Function, layout: str) -> None:
    whole = seeded(3, 6, 48)
    x = LAYOUTS[layout](whole)
    scale = seeded(x.shape[0], x.shape[-1])
    expected = with_gradients(plain)(x.contiguous(), scale, x.contiguous() + 1)
    for actual, truth in zip(with_gradients(ours)(x, scale, x + 1), expected, strict=True):
        torch.testing.assert_close(actual, truth)


def test_scales_that_are_views_of_a_buffer(ours: Function) -> None:
    values = seeded(3, 100)
    for scale in (values[:, 10:58], values[:1, 10:58], seeded(48, 3).T):
        for actual, truth in zip(
            with_gradients(ours)(seeded(3, 6, 48), scale),
            with_gradients(plain)(seeded(3, 6, 48), scale.contiguous()),
            strict=True,
        ):
            torch.testing.assert_close(actual, truth)


def test_gradients_are_deterministic(ours: Function) -> None:
    x, scale = seeded(2, 70, 96), seeded(1, 96)
    first, second = (with_gradients(ours)(x, scale) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_each_output_alone_has_a_gradient(ours: Function) -> None:
    x, scale, residual = (seeded(2, 3, 8).requires_grad_() for _ in range(3))
    for i in range(2):
        ours_i = torch.autograd.grad(ours(x, scale[0, :1], residual)[i].sum(), (x, residual))
        plain_i = torch.autograd.grad(plain(x, scale[0, :1], residual)[i].sum(), (x, residual))
        for actual, truth in zip(ours_i, plain_i, strict=True):
            torch.testing.assert_close(actual, truth)


def test_fp32_stream_with_a_bf16_increment_under_autocast(ours: Function) -> None:
    x, scale, residual = seeded(2, 3, 64).bfloat16(), seeded(2, 64), seeded(2, 3, 64).flip(0)
    with torch.autocast(DEVICE, torch.bfloat16):
        summed, y = ours(x, scale, residual)
    assert (summed.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(summed, x + residual)
    torch.testing.assert_close(y, plain(x, scale, residual)[1].bfloat16())


@pytest.mark.versions
def test_fullgraph_forward_and_backward_equal_eager(ours: Function) -> None:
    x, scale, residual = seeded(2, 5, 24), seeded(2, 24), seeded(2, 5, 24).flip(1)
    eager = with_gradients(ours)(x, scale, residual)
    for backend in ("aot_eager", "inductor"):
        graph = torch.compile(ours, fullgraph=True, backend=backend)
        for actual, truth in zip(with_gradients(graph)(x, scale, residual), eager, strict=True):
            torch.testing.assert_close(actual, truth)


@pytest.mark.versions
def test_operators_pass_opcheck(implementation: str) -> None:
    x, scale, rms = seeded(2, 5, 24), seeded(2, 24), seeded(2, 5).abs()
    overload = "default" if implementation == "cpu" else implementation
    fwd = getattr(torch.ops.dimr_fast.td_rms_norm_fwd, overload)
    bwd = getattr(torch.ops.dimr_fast.td_rms_norm_bwd, overload)
    torch.library.opcheck(fwd, (x, None, scale, torch.float32))
    torch.library.opcheck(fwd, (x, x.flip(0).bfloat16(), scale, torch.bfloat16))
    torch.library.opcheck(bwd, (x, None, x, scale, rms, False))
    torch.library.opcheck(bwd, (x, x, x, scale, rms, True))


def test_no_output_is_left_unwritten(ours: Function, poisoned_memory: None) -> None:
    x, scale = seeded(2, 11, 300), seeded(1, 300)
    for result in with_gradients(ours)(x, scale, x.flip(0)):
        assert result.isfinite().all()


BAD: list[tuple[Callable[[Function], Any], str]] = [
    (
        lambda ours: ours(seeded(2, 3, 4), seeded(1, 4), seeded(2, 3, 5)),
        r"residual: got shape \(2, 3",
    ),
    (
        lambda ours: ours(seeded(2, 3, 4), seeded(1, 4), torch.ones(2, 3, 4, device="meta")),
        "residual: got device meta",
    ),
    (lambda ours: ours(seeded(2, 3, 4).double(), seeded(1, 4)), "x is float64"),
    (
        lambda ours: ours(torch.ones(2, 3, 4, dtype=torch.int32), seeded(1, 4)),
        "x: got dtype torch.int32",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_names_the_argument(
    ours: Function, call: Callable[[Function], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(ours)


def test_addresses_past_32_bits(ours: Function) -> None:
    """Rows are far apart: the last begins more than 2³¹ elements after the first.

    The buffer takes 4 GiB of address space in fp16, but only the pages of the rows use memory.
    """
    far = (2**31 + 4096) // 2
    x = torch.empty(2 * far + 8, dtype=torch.float16, device=DEVICE)
    rows = x.as_strided((1, 3, 8), (0, far, 1))
    rows.copy_(seeded(1, 3, 8))
    torch.testing.assert_close(ours(rows, seeded(1, 8)), plain(rows.clone(), seeded(1, 8)))


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

WIDTHS = {960: TARGETS, 1152: ("sm_90",), 480: ("sm_90",), 240: ("sm_90",), 66816: ("sm_90",)}


def aot_launches() -> list[Launch]:
    from dimr_fast.kernels.td_rms_norm import launch_bwd, launch_fwd

    launches = []
    for width, targets in WIDTHS.items():
        x, scale, rms = (
            meta(4, 257, width),
            meta(4, width, dtype=torch.float32),
            meta(4, 257, dtype=torch.float32),
        )
        launches += [
            Launch(
                f"forward {width}",
                lambda x=x, s=scale: launch_fwd(x, x, s, torch.bfloat16),
                targets,
            ),
            Launch(
                f"backward {width}",
                lambda x=x, s=scale, r=rms: launch_bwd(x, x, x, s, r, True),
                targets,
            ),
        ]
    return launches


@pytest.mark.slow
@pytest.mark.versions
@needs_triton
def test_compiled_kernels_do_not_spill() -> None:
    for kernel in compiled("tests.ops.test_td_rms_norm"):
        assert kernel.spilled == 0, kernel
        assert kernel.count("LDL") == kernel.count("STL") == 0, kernel


@pytest.mark.slow
@needs_triton
def test_rows_move_in_16_byte_pieces() -> None:
    """All loads and stores of features do; only statistics, one number per row, are smaller."""
    for kernel in compiled("tests.ops.test_td_rms_norm"):
        if kernel.target == "gfx942" or kernel.kernel == "_sum_partials_kernel":
            continue
        if int(kernel.launch.split()[-1]) >= 960:
            assert kernel.count("LDG.E.64") == kernel.count("STG.E.64") == 0, kernel
            assert kernel.count("LDG.E.128") >= 4, kernel
            assert kernel.count("STG.E.128") >= 1, kernel
