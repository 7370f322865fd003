"""The CPU library's gradients of a linear layer's weight and bias, in every instruction set."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dimr_fast import ops
from tests.support.cpu_library import needs_cpu, on_threads
from tests.support.operator_calls import Recorder
from tests.support.oracle import seeded

pytestmark = [needs_cpu]

BF16 = torch.bfloat16
gradient = torch.ops.dimr_fast.weight_gradient

SHAPES = [
    (1, 1, (1,)),
    (2, 3, (5,)),
    (129, 19, (37,)),
    (300, 97, (48,)),
    (257, 96, (160, 160)),
    (2500, 192, (48,)),
    (700, 8, (17, 1, 64)),
]
"""Rows, outputs, and the widths of the inputs."""


def tensors(rows: int, height: int, widths: tuple[int, ...]) -> list[torch.Tensor]:
    return [seeded(rows, size).to(BF16) for size in (height, *widths)]


@pytest.mark.parametrize(("rows", "height", "widths"), SHAPES, ids=str)
def test_every_instruction_set(
    instruction_set: str, rows: int, height: int, widths: tuple[int, ...]
) -> None:
    """Products of bf16 numbers are exact in fp32: only their sum is rounded."""
    dy, *inputs = tensors(rows, height, widths)
    dweight, dbias = gradient(dy, inputs)
    assert dweight.dtype == dbias.dtype == torch.float32
    exact_dy, exact_x = dy.double(), torch.cat(inputs, 1).double()
    for actual, expected, size in (
        (dweight, exact_dy.mT @ exact_x, exact_dy.abs().mT @ exact_x.abs()),
        (dbias, exact_dy.sum(0), exact_dy.abs().sum(0)),
    ):
        allowed = rows * torch.finfo(torch.float32).eps * size
        assert ((actual - expected).abs() <= allowed).all()


def test_rows_may_be_slices(instruction_set: str) -> None:
    dy, x = tensors(40, 30, (50,))
    sliced = gradient(dy[::2, 3:20], [x[::2, :33], x[::2, 40:]])
    copied = gradient(dy[::2, 3:20].clone(), [torch.cat([x[::2, :33], x[::2, 40:]], 1)])
    for actual, expected in zip(sliced, copied, strict=True):
        torch.testing.assert_close(actual, expected)


def test_columns_may_be_apart(instruction_set: str) -> None:
    dy, x = tensors(40, 30, (50,))
    apart = gradient(dy.mT.contiguous().mT, [x.mT.contiguous().mT])
    for actual, expected in zip(apart, gradient(dy, [x]), strict=True):
        assert torch.equal(actual, expected)


def test_results_do_not_depend_on_threads(instruction_set: str) -> None:
    dy, *inputs = tensors(5000, 130, (70, 20))
    one, three = (on_threads(count, lambda: gradient(dy, inputs)) for count in (1, 3))
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_no_rows_give_zeros() -> None:
    for result in gradient(torch.empty(0, 3, dtype=BF16), [torch.empty(0, 5, dtype=BF16)]):
        assert result.numel() in (15, 3)
        assert not result.any()


def test_no_output_is_left_unwritten(poisoned_memory: None) -> None:
    dy, *inputs = tensors(300, 97, (37, 48))
    for result in gradient(dy, inputs):
        assert result.isfinite().all()


def test_linear_layers_get_the_gradients_of_pytorch() -> None:
    """Whichever of the two computes them on this processor."""
    x, weight, bias = seeded(300, 48), seeded(97, 48) / 7, seeded(97)
    found = []
    for run in (lambda *t: ops.linear([t[0]], [t[1]], [t[2]]), torch.nn.functional.linear):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        with torch.autocast("cpu", BF16):
            run(*leaves).float().square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for actual, expected in zip(*found, strict=True):
        assert actual.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02 * expected.abs().max())


def test_linear_layers_use_the_kernel_where_it_is_faster(instruction_set: str) -> None:
    x, weight = seeded(8, 6).to(BF16), seeded(4, 6).to(BF16).requires_grad_()
    with Recorder(most=1) as recorder:
        ops.linear([x], [weight], []).sum().backward()
    used = "dimr_fast::weight_gradient" in recorder.calls
    assert used == (instruction_set == "AVX-512 with BF16")


X = torch.ones(4, 6, dtype=BF16)

BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: gradient(X[0], [X]), "dy: "),
    (lambda: gradient(X.float(), [X]), "dy: "),
    (lambda: gradient(X, [X[1:]]), "inputs: expected 4 rows, got 3"),
    (lambda: gradient(X, [X, X.half()]), "inputs: "),
    (lambda: gradient(X, []), "inputs: "),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_the_bare_operator_refuses_what_it_cannot_read(
    call: Callable[[], Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
