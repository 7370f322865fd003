"""The noise schedule: the published values, at its steps and between them."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dimr_fast.diffusion import (
    time_condition,
)
from tests.support.diffusion import (
    GOLDEN,
    SCHEDULE,
    assert_argument_is_named,
)


def test_schedule_has_the_published_values() -> None:
    for name in ("betas", "alphas_cumprod"):
        values = getattr(SCHEDULE, name)
        assert values.dtype == torch.float64
        torch.testing.assert_close(values, GOLDEN[f"schedule/{name}"], rtol=1e-14, atol=0)


def test_continuous_time_has_the_published_values() -> None:
    """The published schedule works in float32, which alone limits the agreement at small t."""
    for i, t in enumerate(GOLDEN["schedule/t"].tolist()):
        lam = GOLDEN["schedule/lambda_at_t"][i].item()
        assert SCHEDULE.half_log_snr(t) == pytest.approx(lam, rel=4e-6, abs=4e-6)
        log_alpha = GOLDEN["schedule/log_alpha_at_t"][i].item()
        assert SCHEDULE.log_alpha(t) == pytest.approx(log_alpha, rel=4e-6, abs=2e-8)
        expected = GOLDEN["schedule/t_of_lambda"][i].item()
        assert SCHEDULE.time_at(lam) == pytest.approx(expected, rel=4e-6, abs=5e-8)


@given(st.floats(1e-3, 1.0))
def test_time_is_the_inverse_of_half_log_snr(t: float) -> None:
    assert SCHEDULE.time_at(SCHEDULE.half_log_snr(t)) == pytest.approx(t, rel=1e-10)


@given(st.floats(1e-3, 1.0))
def test_alpha_and_sigma_keep_unit_variance(t: float) -> None:
    alpha, sigma = SCHEDULE.alpha_sigma(t)
    assert alpha**2 + sigma**2 == pytest.approx(1, rel=1e-14)
    assert math.log(alpha / sigma) == pytest.approx(SCHEDULE.half_log_snr(t), abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 500, 999, 1000])
def test_continuous_time_passes_through_the_steps(n: int) -> None:
    expected = 0.5 * math.log(SCHEDULE.alphas_cumprod[n - 1].item())
    assert SCHEDULE.log_alpha(n / 1000) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (3,), (3, 5)])
def test_add_noise(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x0, noise = torch.randn(2, *shape, dtype=dtype)
    step = torch.tensor([1, 400, 1000])
    noisy = SCHEDULE.add_noise(x0, noise, step)
    assert noisy.dtype == dtype
    for image, n in enumerate(step.tolist()):
        kept = GOLDEN["schedule/alphas_cumprod"][n - 1]
        expected = kept.sqrt() * x0[image].double() + (1 - kept).sqrt() * noise[image].double()
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            noisy[image].double(), expected, rtol=tolerance, atol=tolerance * 4
        )


def test_condition_is_linear_in_the_step() -> None:
    condition = SCHEDULE.condition(torch.tensor([[1, 250], [500, 1000]]))
    assert condition.dtype == torch.float32
    torch.testing.assert_close(condition, torch.tensor([[-3.992, -2.0], [0.0, 4.0]]))
    torch.testing.assert_close(time_condition(torch.tensor(0.25)), torch.tensor(-2.0))


X = torch.zeros(2, 4, 8, 8)
STEP = torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: SCHEDULE.add_noise(X.long(), X, STEP), "x0"),
        (lambda: SCHEDULE.add_noise(X.to("meta"), X, STEP), "x0"),
        (lambda: SCHEDULE.add_noise(X, X[:1], STEP), "noise"),
        (lambda: SCHEDULE.add_noise(X, X.double(), STEP), "noise"),
        (lambda: SCHEDULE.add_noise(X, X.to("meta"), STEP), "noise"),
        (lambda: SCHEDULE.add_noise(X, X, STEP.float()), "step"),
        (lambda: SCHEDULE.add_noise(X, X, STEP[:1]), "step"),
        (lambda: SCHEDULE.add_noise(X, X, STEP - 1), "step"),
        (lambda: SCHEDULE.add_noise(X, X, STEP + 999), "step"),
        (lambda: SCHEDULE.add_noise(X, X, STEP.to("meta")), "step"),
        (lambda: SCHEDULE.condition(STEP.float()), "step"),
        (lambda: SCHEDULE.log_alpha(0.0), "t"),
        (lambda: SCHEDULE.half_log_snr(1.01), "t"),
        (lambda: SCHEDULE.alpha_sigma(math.nan), "t"),
        (lambda: SCHEDULE.time_at(math.nan), "half_log_snr"),
    ],
)
def test_bad_arguments_of_the_schedule_are_named(call: Callable[[], object], argument: str) -> None:
    assert_argument_is_named(call, argument)
