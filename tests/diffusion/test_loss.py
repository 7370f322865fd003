"""The multi-scale loss: the published values and its formula."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from dimr_fast.diffusion import (
    multi_scale_loss,
    pool_noise,
)
from tests.support.diffusion import (
    assert_argument_is_named,
)
from tests.support.paths import FILES

MODEL_CASES = ["two_branch_tdrms", "two_branch_tdln", "two_branch_rms", "three_branch_tdrms"]


@pytest.mark.parametrize("case", MODEL_CASES)
def test_loss_has_the_published_values(case: str) -> None:
    with safe_open(FILES / f"{case}.safetensors", "pt") as file:
        coefficients = json.loads(file.metadata()["config"])["loss_coeffs"]
        predictions = [file.get_tensor(f"mixed_time/out/{i}") for i in range(len(coefficients))]
        noise, expected = file.get_tensor("in/noise"), file.get_tensor("loss/per_image")
    torch.testing.assert_close(
        multi_scale_loss(predictions, noise, coefficients), expected, rtol=2e-6, atol=0
    )
    assert torch.equal(
        multi_scale_loss(predictions, noise), multi_scale_loss(predictions, noise, coefficients)
    )


@settings(max_examples=25, deadline=None)
@given(
    factors=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    aspect=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_loss_against_the_formula(
    factors: list[int], batch: int, channels: int, aspect: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    height, width = 12, 12 * aspect
    noise = torch.randn(batch, channels, height, width, dtype=dtype, generator=generator)
    coefficients = [0.5 + 0.25 * i for i in range(len(factors))]
    predictions = [
        torch.randn(batch, channels, height // q, width // q, dtype=dtype, generator=generator)
        for q in factors
    ]
    expected = torch.zeros(batch, dtype=torch.float64)
    for q, c, prediction in zip(factors, coefficients, predictions, strict=True):
        boxes = noise.double().reshape(batch, channels, height // q, q, width // q, q)
        target = boxes.sum(dim=(3, 5)) / q
        expected += c * ((prediction.double() - target) ** 2).flatten(1).mean(1)
    actual = multi_scale_loss(predictions, noise, coefficients)
    assert actual.dtype == dtype
    torch.testing.assert_close(
        actual.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0
    )


@settings(max_examples=10, deadline=None)
@given(factor=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_pooled_noise_has_unit_variance(factor: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = 64
    noise = torch.randn(1, 4, values * factor, values * factor, generator=generator)
    pooled = pool_noise(noise, factor)
    assert pooled.shape == (1, 4, values, values)
    # Six standard deviations of the variance of 4·64² normal values.
    assert pooled.var().item() == pytest.approx(1, abs=6 * math.sqrt(2 / pooled.numel()))


def test_loss_of_low_precision_predictions_is_computed_in_float32() -> None:
    noise = torch.randn(2, 4, 8, 8)
    predictions = [torch.randn(2, 4, n, n, dtype=torch.bfloat16) for n in (4, 8)]
    loss = multi_scale_loss(predictions, noise)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, multi_scale_loss([p.float() for p in predictions], noise))


def test_loss_gradient_is_that_of_the_mean_squared_error() -> None:
    noise = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    predictions = [
        torch.randn(2, 3, n, n, dtype=torch.float64, requires_grad=True) for n in (2, 4, 8)
    ]
    multi_scale_loss(predictions, noise).sum().backward()
    for prediction, coefficient in zip(predictions, (0.25, 0.5, 1.0), strict=True):
        target = pool_noise(noise, 8 // prediction.shape[-1])
        count = prediction[0].numel()
        expected = 2 * coefficient * (prediction.detach() - target) / count
        torch.testing.assert_close(prediction.grad, expected)


X = torch.zeros(2, 4, 8, 8)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: pool_noise(X, 3), "factor"),
        (lambda: pool_noise(X, 0), "factor"),
        (lambda: pool_noise(X[0], 2), "noise"),
        (lambda: multi_scale_loss([], X), "predictions"),
        (lambda: multi_scale_loss([X, X], X, (1.0,)), "coefficients"),
        (lambda: multi_scale_loss([X], X, (math.nan,)), "coefficients"),
        (lambda: multi_scale_loss([X] * 4, X), "coefficients"),
        (lambda: multi_scale_loss([X], X[0]), "noise"),
        (lambda: multi_scale_loss([X], X.long()), "noise"),
        (lambda: multi_scale_loss([X[..., :3, :3], X], X), "predictions[0]"),
        (lambda: multi_scale_loss([X[..., :4], X], X), "predictions[0]"),
        (lambda: multi_scale_loss([X, X[:1]], X), "predictions[1]"),
        (lambda: multi_scale_loss([X[..., :0, :0], X], X), "predictions[0]"),
        (lambda: multi_scale_loss([X[0]], X), "predictions[0]"),
    ],
)
def test_bad_arguments_of_the_loss_are_named(call: Callable[[], object], argument: str) -> None:
    assert_argument_is_named(call, argument)
