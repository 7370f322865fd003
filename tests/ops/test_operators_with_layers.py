"""Norms and the gated GELU that end with linear layers, whose input backward computes again."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dimr_fast import ops
from tests.support.oracle import DEVICE, assert_as_accurate, seeded, with_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTH, HEIGHTS = 40, (24, 9)

INPUTS: dict[str, Callable[[], list[torch.Tensor]]] = {
    "td_rms_norm": lambda: [seeded(2, 33, WIDTH), seeded(2, WIDTH), seeded(2, 33, WIDTH).flip(0)],
    "td_layer_norm": lambda: [
        seeded(2, 33, WIDTH),
        seeded(2, WIDTH),
        seeded(1, WIDTH),
        seeded(2, 33, WIDTH).flip(0),
    ],
    "rms_norm": lambda: [seeded(2, 33, WIDTH), seeded(WIDTH), seeded(2, 33, WIDTH).flip(0)],
    "gated_gelu": lambda: [seeded(2, 33, 2 * WIDTH)],
}
each_operator = pytest.mark.parametrize("operator", INPUTS)


@pytest.fixture(scope="module", params=["triton", "cpu"])
def implementation(request: pytest.FixtureRequest) -> str:
    reason = ops.OPERATORS["gated_gelu"].why_not(request.param, seeded(1))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def layers(bias: bool = True) -> list[torch.Tensor]:
    weights = [seeded(height, WIDTH) / WIDTH**0.5 for height in HEIGHTS]
    return [*weights, *(seeded(height) for height in HEIGHTS if bias)]


def with_layers(operator: str, implementation: str) -> Callable[..., Any]:
    """The operator as a function of its own inputs, then two weights, then two biases or none."""
    own = len(INPUTS[operator]())
    function = functools.partial(getattr(ops, operator), implementation=implementation)
    return lambda *t: function(*t[:own], t[own : own + 2], t[own + 2 :])


def in_two_steps(operator: str) -> Callable[..., Any]:
    """The reference of the operator, then PyTorch's linear layer."""
    own = len(INPUTS[operator]())

    def run(*t: torch.Tensor) -> Any:
        y = getattr(ops, operator)(*t[:own], implementation="reference")
        *others, y = y if isinstance(y, tuple) else (y,)
        bias = torch.cat(t[own + 2 :]) if t[own + 2 :] else None
        return (*others, F.linear(y, torch.cat(t[own : own + 2]), bias))

    return run


@each_operator
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients(
    operator: str, implementation: str, dtype: torch.dtype, bias: bool
) -> None:
    ours, plain = with_layers(operator, implementation), in_two_steps(operator)
    given = [*INPUTS[operator](), *layers(bias)]
    assert_as_accurate(with_gradients(ours), with_gradients(plain), *given, dtype=dtype)


@each_operator
def test_gradients_have_the_bits_of_those_in_two_steps(operator: str, implementation: str) -> None:
    """What backward computes again is what forward had computed."""
    own = len(INPUTS[operator]())

    def separate(*t: torch.Tensor) -> Any:
        y = getattr(ops, operator)(*t[:own], implementation=implementation)
        *others, y = y if isinstance(y, tuple) else (y,)
        return (*others, ops.linear([y], t[own : own + 2], t[own + 2 :]))

    given = [t.bfloat16() for t in (*INPUTS[operator](), *layers())]
    found = with_gradients(with_layers(operator, implementation))(*given)
    for actual, expected in zip(found, with_gradients(separate)(*given), strict=True):
        assert torch.equal(actual, expected)


@contextmanager
def kept_tensors() -> Iterator[list[torch.Tensor]]:
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@each_operator
def test_the_input_of_the_layers_is_not_kept(operator: str, implementation: str) -> None:
    given = [t.requires_grad_() for t in (*INPUTS[operator](), *layers())]
    with kept_tensors() as kept:
        outputs = with_layers(operator, implementation)(*given)
    known = {t.data_ptr() for t in (*given, *(outputs if isinstance(outputs, tuple) else ()))}
    unknown = [t for t in kept if t.data_ptr() not in known]
    # The concatenated weight and, of the norms, statistics: one or two numbers a row.
    assert all(t.numel() in (sum(HEIGHTS) * WIDTH, 2 * 33) for t in unknown)


@each_operator
def test_autocast_decides_on_the_dtype_and_gradients_have_their_tensors(
    operator: str, implementation: str
) -> None:
    given = [t.requires_grad_() for t in (*INPUTS[operator](), *layers())]
    with torch.autocast(DEVICE, torch.bfloat16):
        found = with_layers(operator, implementation)(*given)
        expected = in_two_steps(operator)(*given)
    y = found[-1] if isinstance(found, tuple) else found
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected[-1], atol=0.05, rtol=0.05)
    y.float().square().sum().backward()
    for tensor in given:
        assert tensor.grad is not None
        assert (tensor.grad.dtype, tensor.grad.shape) == (tensor.dtype, tensor.shape)


@each_operator
def test_only_what_needs_a_gradient_gets_one(operator: str, implementation: str) -> None:
    given = [*INPUTS[operator](), *layers()]
    given[0].requires_grad_()
    given[-3].requires_grad_()  # the second weight
    found = with_layers(operator, implementation)(*given)
    (found[-1] if isinstance(found, tuple) else found).sum().backward()
    wanted = {0, len(given) - 3}
    assert {i for i, t in enumerate(given) if t.grad is not None} == wanted


@each_operator
@pytest.mark.versions
@pytest.mark.parametrize("gradients", [True, False])
def test_fullgraph_equals_eager(operator: str, implementation: str, gradients: bool) -> None:
    torch.compiler.reset()  # all operators share the code of one function
    run = with_layers(operator, implementation)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    given = [*INPUTS[operator](), *layers()]
    if gradients:
        run, compiled = with_gradients(run), with_gradients(compiled)
    expected, actual = run(*given), compiled(*given)
    torch.testing.assert_close(actual, expected)


@each_operator
def test_a_layer_that_does_not_fit_is_named(operator: str) -> None:
    run = with_layers(operator, "reference")
    own, (w0, w1, b0, b1) = INPUTS[operator](), layers()
    for bad, message in (
        ((w0, w1[:, 1:], b0, b1), rf"weights\[1\]: got \(9, 39\), expected \[D, {WIDTH}\]"),
        ((w0, w1, b0), "biases: got 1, expected none or 2"),
        ((w0, w1, b0, b0), r"biases\[1\]: got \(24,\), expected \(9,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*own, *bad)
