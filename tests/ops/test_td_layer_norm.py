"""`td_layer_norm` by Triton (interpreted without a GPU) and by the compiled CPU library."""

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
    reason = ops.OPERATORS["td_layer_norm"].why_not(request.param, seeded(1))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(scope="module")
def ours(implementation: str) -> Function:
    return functools.partial(ops.td_layer_norm, implementation=implementation)


def plain(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> Any:
    return ops.td_layer_norm(x, weight, bias, residual, implementation="reference")


def values(times: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return seeded(times, width), seeded(times, width).flip(1)


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
    inputs = x, *values(shape[0] if times == "per image" else 1, shape[-1])
    assert_as_accurate(with_gradients(ours), with_gradients(plain), *inputs, dtype=dtype)
    assert_as_accurate(with_gradients(ours), with_gradients(plain), *inputs, residual, dtype=dtype)


@pytest.mark.parametrize("mean", [100, -1000])
@pytest.mark.parametrize("width", [40, 960, 9000])
def test_a_mean_far_above_the_deviation(ours: Function, width: int, mean: float) -> None:
    """Half precision cannot represent such rows; fp32 must be as accurate as the reference."""
    inputs = seeded(2, 3, width) + mean, *values(2, width)
    assert_as_accurate(with_gradients(ours), with_gradients(plain), *inputs, dtype=torch.float32)


def test_a_first_block_unlike_the_rest(ours: Function) -> None:
    x = seeded(1, 2, 9000)
    x[..., 2048:] += 1000
    inputs = x, *values(1, 9000)
    assert_as_accurate(with_gradients(ours), with_gradients(plain), *inputs, dtype=torch.float32)


def test_times_of_weight_and_bias_may_differ(ours: Function) -> None:
    x, weight, bias = seeded(3, 4, 24), seeded(3, 24), seeded(1, 24)
    for inputs in ((x, weight, bias), (x, bias, weight)):
        assert_as_accurate(
            with_gradients(ours), with_gradients(plain), *inputs, dtype=torch.float32
        )


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
    x, (weight, bias) = rows[None].to(DEVICE), values(1, 40)
    result = with_gradients(ours)(x.to(dtype), weight.to(dtype), bias.to(dtype))
    finite = with_gradients(plain)(x.to(dtype), weight.to(dtype), bias.to(dtype))
    for a, b in zip(result, finite, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
    assert_as_accurate(ours, plain, x, weight, bias, dtype=dtype)
    if all(f.isfinite().all() for f in finite):
        assert_as_accurate(
            with_gradients(ours), with_gradients(plain), x, weight, bias, dtype=dtype
        )


def test_rows_of_one_are_the_bias(ours: Function) -> None:
    x, (weight, bias) = seeded(2, 5, 1), values(1, 1)
    y, dx, *_ = with_gradients(ours)(x, weight, bias)
    assert torch.equal(y, bias.expand(2, 5, 1))
    assert not dx.any()


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
    inputs = seeded(images, rows, width), *values(1 if shared else images, width)
    assert_as_accurate(with_gradients(ours), with_gradients(plain), *inputs, dtype=dtype)


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
    weight, bias = values(x.shape[0], x.shape[-1])
    expected = with_gradients(plain)(x.contiguous(), weight, bias, x.contiguous() + 1)
    for actual, truth in zip(with_gradients(ours)(x, weight, bias, x + 1), expected, strict=True):
        torch.testing.assert_close(actual, truth)


@pytest.mark.parametrize("width", [96, 3000])
def test_gradients_are_deterministic(ours: Function, width: int) -> None:
    inputs = seeded(2, 20, width), *values(1, width)
    first, second = (with_gradients(ours)(*inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_each_output_alone_has_a_gradient(ours: Function) -> None:
    x, residual, weight, bias = (seeded(2, 3, 8).requires_grad_() for _ in range(4))
    inputs = x, weight[0, :1], bias[0, :1], residual
    for i in range(2):
        ours_i = torch.autograd.grad(ours(*inputs)[i].sum(), (x, residual))
        plain_i = torch.autograd.grad(plain(*inputs)[i].sum(), (x, residual))
        for actual, truth in zip(ours_i, plain_i, strict=True):
            torch.testing.assert_close(actual, truth)


def test_fp32_stream_with_a_bf16_increment_under_autocast(ours: Function) -> None:
    x, residual = seeded(2, 3, 64).bfloat16(), seeded(2, 3, 64).flip(0)
    weight, bias = values(2, 64)
    with torch.autocast(DEVICE, torch.bfloat16):
        summed, y = ours(x, weight, bias, residual)
    assert (summed.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(summed, x + residual)
    torch.testing.assert_close(y, plain(x, weight, bias, residual)[1].bfloat16())


@pytest.mark.versions
def test_fullgraph_forward_and_backward_equal_eager(ours: Function) -> None:
    inputs = seeded(2, 5, 24), *values(2, 24), seeded(2, 5, 24).flip(1)
    eager = with_gradients(ours)(*inputs)
    for backend in ("aot_eager", "inductor"):
        graph = torch.compile(ours, fullgraph=True, backend=backend)
        for actual, truth in zip(with_gradients(graph)(*inputs), eager, strict=True):
            torch.testing.assert_close(actual, truth)


def test_operators_pass_opcheck(implementation: str) -> None:
    x, (weight, bias) = seeded(2, 5, 24), values(2, 24)
    mean, rstd, dy = seeded(2, 5), seeded(2, 5).abs(), seeded(2, 5, 48)
    overload = "default" if implementation == "cpu" else implementation
    fwd = getattr(torch.ops.dimr_fast.td_layer_norm_fwd, overload)
    bwd = getattr(torch.ops.dimr_fast.td_layer_norm_bwd, overload)
    torch.library.opcheck(fwd, (weight, bias, [x], None, torch.float32))
    torch.library.opcheck(fwd, (weight, bias, [x], x.flip(0).bfloat16(), torch.bfloat16))
    torch.library.opcheck(bwd, (x, None, [x], weight, bias, mean, rstd, True, False))
    torch.library.opcheck(bwd, (x, x, [x], weight, bias, mean, rstd, True, True))
    weight, bias, pieces = weight.repeat(1, 2), bias[:1].repeat(1, 2), [x, x.flip(1)]
    torch.library.opcheck(fwd, (weight, bias, pieces, None, torch.bfloat16))
    torch.library.opcheck(bwd, (dy, None, pieces, weight, bias, mean, rstd, True, True))
    torch.library.opcheck(bwd, (dy, None, pieces, weight, bias, mean, rstd, False, True))


@pytest.mark.parametrize("width", [300, 3000])
def test_no_output_is_left_unwritten(ours: Function, width: int, poisoned_memory: None) -> None:
    x = seeded(2, 11, width)
    for result in with_gradients(ours)(x, *values(1, width), x.flip(0)):
        assert result.isfinite().all()


X, VALUES = seeded(2, 3, 4), values(1, 4)

BAD: list[tuple[Callable[[Function], Any], str]] = [
    (lambda ours: ours(X, *VALUES, seeded(2, 3, 5)), r"residual: got shape \(2, 3"),
    (
        lambda ours: ours(X, *VALUES, torch.ones(2, 3, 4, device="meta")),
        "residual: got device meta",
    ),
    (lambda ours: ours(X.double(), *VALUES), "x is float64"),
    (
        lambda ours: ours(torch.ones(2, 3, 4, dtype=torch.int32), *VALUES),
        "x: got dtype torch.int32",
    ),
    (lambda ours: ours(X, VALUES[0], seeded(1, 5)), "bias: got width 5"),
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
    actual = with_gradients(lambda *v: ours(rows, *v))(*values(1, 8))
    expected = with_gradients(lambda *v: plain(rows.clone(), *v))(*values(1, 8))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

WIDTHS = {960: TARGETS, 1152: ("sm_90",), 480: ("sm_90",), 240: ("sm_90",), 66816: ("sm_90",)}


def aot_launches() -> list[Launch]:
    from dimr_fast.kernels.td_layer_norm import launch_bwd, launch_fwd

    launches = []
    sizes = [("", 4, 257, width, targets) for width, targets in WIDTHS.items()]
    # Triton compiles arguments that are 1 as constants.
    sizes += [("one row ", 1, 1, width, ("sm_90",)) for width in (960, 66816)]
    for name, images, rows, width, targets in sizes:
        x = meta(images, rows, width)
        weight = meta(images, width, dtype=torch.float32)
        mean = meta(images, rows, dtype=torch.float32)

        def forward(x: torch.Tensor = x, weight: torch.Tensor = weight) -> None:
            launch_fwd(weight, weight, [x], x, torch.bfloat16)

        def backward(
            x: torch.Tensor = x, weight: torch.Tensor = weight, mean: torch.Tensor = mean
        ) -> None:
            launch_bwd(x, x, [x], weight, weight, mean, mean, True, True)

        launches += [
            Launch(f"{name}forward {width}", forward, targets),
            Launch(f"{name}backward {width}", backward, targets),
        ]
    return launches


@pytest.mark.slow
@pytest.mark.versions
@needs_triton
def test_compiled_kernels_do_not_spill() -> None:
    for kernel in compiled("tests.ops.test_td_layer_norm"):
        assert kernel.spilled == 0, kernel
        assert kernel.count("LDL") == kernel.count("STL") == 0, kernel


@pytest.mark.slow
@needs_triton
def test_rows_move_in_16_byte_pieces() -> None:
    """All loads and stores of features do; only statistics, one number per row, are smaller."""
    for kernel in compiled("tests.ops.test_td_layer_norm"):
        if kernel.target == "gfx942" or kernel.kernel == "_sum_partials_kernel":
            continue
        width = int(kernel.launch.split()[-1])
        if width >= 960:
            assert kernel.count("LDG.E.64") == kernel.count("STG.E.64") == 0, kernel
            assert kernel.opcodes["LDG.E.128"] >= 2, kernel
            if kernel.kernel != "pieces_bwd_means_kernel":
                assert kernel.opcodes["STG.E.128"] >= 1, kernel
