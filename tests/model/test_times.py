"""The time condition in every dtype that a script may have it in."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dimr_fast import DiMR, optimize_for_inference
from tests.support.cpu_library import needs_cpu
from tests.support.models import inputs, randomised

FAST = [None, torch.float32, torch.bfloat16, torch.float16]
"""The dtype of the optimised model, None for the model itself."""


@pytest.fixture(params=["reference", pytest.param("cpu", marks=needs_cpu)])
def implementation(request: pytest.FixtureRequest) -> str:
    """The implementation of all operators; a whole model is slow in Triton's interpreter."""
    return request.param


def prepared(norm_type: str, fast: torch.dtype | None, implementation: str) -> Any:
    torch.manual_seed(0)
    model = randomised(DiMR.from_preset("tiny", norm_type=norm_type))
    model.set_implementation(implementation)
    return model if fast is None else optimize_for_inference(model, fast)


def predict(model: Any, log_snr: object) -> list[Tensor]:
    with torch.no_grad():
        return model(**(inputs() | {"log_snr": log_snr}))


def same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(actual, expected, strict=True)
    )


@pytest.mark.parametrize("norm_type", ["TDRMSN", "LN", "RMSN"])
@pytest.mark.parametrize("fast", FAST)
def test_times_of_any_dtype_give_the_result_of_float32(
    norm_type: str, fast: torch.dtype | None, implementation: str
) -> None:
    model = prepared(norm_type, fast, implementation)
    for times in (torch.tensor([-3.0, 2.0]), torch.tensor([1.0])):
        expected = predict(model, times)
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32):
            assert same(predict(model, times.to(dtype)), expected), dtype
    rounded = torch.tensor([0.1], dtype=torch.float64)
    assert same(predict(model, rounded), predict(model, rounded.float()))


@pytest.mark.parametrize("fast", FAST)
def test_a_number_is_one_time_for_all_images(fast: torch.dtype | None, implementation: str) -> None:
    model = prepared("TDRMSN", fast, implementation)
    for number in (0.1, 2, -4, np.float64(0.1)):
        expected = predict(model, torch.tensor([float(number)]))
        assert same(predict(model, number), expected), number
        assert same(predict(model, torch.tensor(number)), expected), number


def test_times_in_a_training_step(implementation: str) -> None:
    def gradients(times: object) -> list[Tensor]:
        model = prepared("LN", None, implementation)
        outputs = model(**(inputs() | {"log_snr": times}))
        return list(torch.autograd.grad(sum(o.square().sum() for o in outputs), model.parameters()))

    expected = gradients(torch.tensor([2.0]))
    assert same(gradients(torch.tensor([2.0], dtype=torch.float64)), expected)
    assert same(gradients(2), expected)


def test_times_under_autocast_and_in_half_precision(implementation: str) -> None:
    model = prepared("LN", None, implementation)
    times = torch.tensor([-3.0, 2.0])
    with torch.autocast("cpu", torch.bfloat16):
        assert same(predict(model, times.double()), predict(model, times))
    half = model.bfloat16()
    batch = inputs() | {"x": inputs()["x"].bfloat16()}
    with torch.no_grad():
        expected = half(**batch)
        assert same(half(**(batch | {"log_snr": times.double()})), expected)
        assert same(half(**(batch | {"log_snr": times.int()})), expected)


def test_a_float64_model_keeps_times_in_float64() -> None:
    model = prepared("LN", None, "reference").double()
    x, y = inputs()["x"].double(), inputs()["y"]

    def derivative(step: float) -> Tensor:
        up, down = (model(x, log_snr=0.1 + s, y=y)[-1] for s in (step, -step))
        return (up - down) / (2 * step)

    with torch.no_grad():
        a, b = derivative(1e-5), derivative(1e-4)
    assert (a - b).abs().max() < 1e-6 * a.abs().max()


def test_numbers_in_a_compiled_model(implementation: str) -> None:
    model = prepared("TDRMSN", None, implementation)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for number in (0.5, 0.25, 1, -2.0):
        assert same(predict(compiled, number), predict(model, number))
