"""`ops.linear` with several layers and inputs, against `F.linear` on their concatenation."""

import re

import pytest
import torch
import torch.nn.functional as F

from dimr_fast.ops import linear
from tests.support.oracle import DEVICE, assert_as_accurate, seeded, with_gradients

CASES = {
    "one": ((8,), (12,)),
    "wide layers": ((8,), (24, 24)),
    "narrow layers": ((40,), (3, 5)),
    "two inputs": ((16, 16), (16,)),
    "all": ((6, 10, 4), (7, 9)),
}


def tensors(widths: tuple[int, ...], heights: tuple[int, ...], rows: tuple[int, ...]):
    inputs = [seeded(*rows, d) for d in widths]
    weights = [seeded(h, sum(widths)) / sum(widths) ** 0.5 for h in heights]
    return inputs, weights, [seeded(h) for h in heights]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case: str, dtype: torch.dtype, bias: bool) -> None:
    inputs, weights, biases = tensors(*CASES[case], (3, 37))
    i, w = len(inputs), len(weights)

    def ours(*t):
        return linear(t[:i], t[i : i + w], t[i + w :])

    def whole(*t):
        b = torch.cat(t[i + w :]) if t[i + w :] else None
        return F.linear(torch.cat(t[:i], -1), torch.cat(t[i : i + w]), b)

    given = [*inputs, *weights, *(biases if bias else [])]
    assert_as_accurate(with_gradients(ours), with_gradients(whole), *given, dtype=dtype)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_reference_equals_auto(case: str, bias: bool, autocast: bool) -> None:
    inputs, weights, biases = tensors(*CASES[case], (3, 37))
    found = []
    for implementation in ("auto", "reference"):
        leaves = [t.clone().requires_grad_() for t in (*inputs, *weights, *biases)]
        xs, rest = leaves[: len(inputs)], leaves[len(inputs) :]
        ws, bs = rest[: len(weights)], rest[len(weights) :] if bias else []
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            y = linear(xs, ws, bs, implementation=implementation)
        y.float().square().mean().backward()
        found.append([y, *(leaf.grad for leaf in (*xs, *ws, *bs))])
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {}
    for auto, reference in zip(*found, strict=True):
        torch.testing.assert_close(reference, auto, **tolerance)


def test_autocast_decides_on_the_dtype_and_gradients_have_their_tensors() -> None:
    inputs, weights, biases = tensors(*CASES["all"], (2, 5))
    inputs[1] = inputs[1].bfloat16()
    leaves = [t.requires_grad_() for t in (*inputs, *weights, *biases)]
    with torch.autocast(DEVICE, torch.bfloat16):
        y = linear(inputs, weights, biases)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert (leaf.grad.dtype, leaf.grad.shape) == (leaf.dtype, leaf.shape)
        assert leaf.grad.abs().max() > 0


def test_only_what_needs_a_gradient_gets_one() -> None:
    inputs, weights, biases = tensors(*CASES["two inputs"], (2, 5))
    inputs[1].requires_grad_()
    linear(inputs, weights, biases).sum().backward()
    assert [t.grad is not None for t in (*inputs, *weights, *biases)] == [False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_negated_views_keep_their_sign(dtype: torch.dtype) -> None:
    inputs, weights, biases = tensors(*CASES["wide layers"], (2, 5))
    inputs = [x.to(dtype) for x in inputs]
    weights = [torch._neg_view(w) for w in weights]
    ours = linear(inputs, weights, biases)
    expected = linear(inputs, weights, biases, implementation="reference")
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("rows", [(0, 5), (2, 0)])
def test_no_rows(rows: tuple[int, int]) -> None:
    inputs, weights, biases = tensors(*CASES["all"], rows)
    weights[0].requires_grad_()
    y = linear(inputs, weights, biases)
    assert y.shape == (*rows, 16)
    y.sum().backward()
    assert weights[0].grad is not None
    assert not weights[0].grad.any()


@pytest.mark.parametrize("name", ["inputs[1]", "weights[1]", "biases[0]"])
def test_tensors_on_another_device_are_refused(name: str) -> None:
    """Without rows PyTorch itself would return a result of uninitialised parameters."""
    given = dict(zip(("inputs", "weights", "biases"), tensors(*CASES["all"], (0, 5)), strict=True))
    argument, position = name.rstrip("]").split("[")
    given[argument][int(position)] = given[argument][int(position)].to("meta")
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: got device meta, expected"):
        linear(**given)
