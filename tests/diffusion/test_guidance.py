"""Classifier-free guidance: its formula, its batches and its schedules."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dimr_fast.diffusion import (
    SOLVERS,
    Autoguided,
    ConstantGuidance,
    DiscreteSchedule,
    PowerCosineGuidance,
    guided,
    multi_scale_loss,
)
from tests.support.diffusion import (
    ClassModel,
    assert_argument_is_named,
    with_class,
    without_class,
)


def test_guidance_is_one_batch_of_twice_the_size() -> None:
    model = ClassModel()
    x, y = torch.randn(3, 4, 8, 8), torch.tensor([5, 6, 7])
    t = torch.tensor(0.3)
    noise = guided(model, y, 0, ConstantGuidance(0.4))(x, t)
    [(both, condition, labels)] = model.calls
    assert torch.equal(both, torch.cat([x, x]))
    assert torch.equal(labels, torch.tensor([5, 6, 7, 0, 0, 0]))
    torch.testing.assert_close(condition, torch.tensor([8 * 0.3 - 4]))
    conditional, null = with_class(x, t), without_class(x, t)
    torch.testing.assert_close(noise, conditional + 0.4 * (conditional - null))


class Twice(torch.nn.Module):
    """Predict the input times the label at two resolutions."""

    def forward(self, x: torch.Tensor, *, y: torch.Tensor) -> list[torch.Tensor]:
        return [x[..., ::2, ::2] * y, x * y]


class Thrice(Twice):
    """Predict half as much more."""

    def forward(self, x: torch.Tensor, *, y: torch.Tensor) -> list[torch.Tensor]:
        return [1.5 * prediction for prediction in super().forward(x, y=y)]


@pytest.mark.parametrize(("strength", "factor"), [(0.0, 1.0), (1.0, 0.5), (2.0, 0.0), (-1.0, 1.5)])
def test_a_worse_model_leads_every_prediction_away_from_its_own(
    strength: float, factor: float
) -> None:
    x, y = torch.randn(2, 3, 4, 4), torch.tensor(2)
    found = Autoguided(Twice(), Thrice(), strength)(x, y=y)
    for prediction, expected in zip(found, Twice()(x, y=y), strict=True):
        torch.testing.assert_close(prediction, factor * expected)


@pytest.mark.parametrize("strength", [-1.5, math.nan, math.inf])
def test_a_strength_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=f"strength: got {strength}"):
        Autoguided(Twice(), Thrice(), strength)


@pytest.mark.parametrize("guidance", [ConstantGuidance(1.5), PowerCosineGuidance(4.0, 2.0)])
def test_guidance_with_a_time_for_each_image(
    guidance: ConstantGuidance | PowerCosineGuidance,
) -> None:
    x, y = torch.randn(3, 4, 8, 8), torch.tensor([5, 6, 7])
    t = torch.tensor([0.1, 0.6, 1.0])
    model = ClassModel()
    noise = guided(model, y, 0, guidance)(x, t)
    assert model.calls[0][1].shape == (6,)
    for i in range(3):
        alone = guided(ClassModel(), y[i : i + 1], 0, guidance)(x[i : i + 1], t[i])
        torch.testing.assert_close(noise[i : i + 1], alone)


@pytest.mark.parametrize("guidance", [ConstantGuidance(0.0), PowerCosineGuidance(1.0, 2.0)])
def test_no_guidance_skips_the_null_half(
    guidance: ConstantGuidance | PowerCosineGuidance,
) -> None:
    model = ClassModel()
    x, y, t = torch.randn(3, 4, 8, 8), torch.tensor([5, 6, 7]), torch.tensor(0.3)
    noise = guided(model, y, 0, guidance)(x, t)
    [(alone, _, labels)] = model.calls
    assert alone is x
    assert labels is y
    torch.testing.assert_close(noise, with_class(x, t))


def test_guidance_of_minus_one_is_the_unconditional_prediction_alone() -> None:
    model = ClassModel()
    x, y, t = torch.randn(3, 4, 8, 8), torch.tensor([5, 6, 7]), torch.tensor(0.3)
    noise = guided(model, y, 0, ConstantGuidance(-1.0), interval=(0.2, 0.4))
    found = noise(x, t)
    [(alone, _, labels)] = model.calls
    assert alone is x
    assert labels.tolist() == [0, 0, 0]
    torch.testing.assert_close(found, without_class(x, t))
    outside = torch.tensor(0.5)
    torch.testing.assert_close(noise(x, outside), with_class(x, outside))


@given(st.floats(0, 1), st.floats(1, 20), st.floats(0.1, 8))
def test_power_cosine_weight(t: float, peak: float, power: float) -> None:
    extra = PowerCosineGuidance(peak, power).extra(torch.tensor(t, dtype=torch.float64)).item()
    weight = (peak - 1) * 0.5 * (1 - math.cos(math.pi * (1 - t) ** power)) + 1
    assert 1 + extra == pytest.approx(weight)
    assert 0 <= extra <= peak - 1 + 1e-12


def test_guidance_is_computed_in_the_dtype_of_the_state() -> None:
    x, y, t = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor(0.5)

    def half(x: torch.Tensor, condition: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ClassModel()(x, condition, y).bfloat16()

    noise = guided(half, y, 0, ConstantGuidance(2.0))(x, t)
    conditional, null = (f(x, t).bfloat16().float() for f in (with_class, without_class))
    assert noise.dtype == torch.float32
    torch.testing.assert_close(noise, conditional + 2 * (conditional - null))


X = torch.zeros(2, 4, 8, 8)
LABELS = torch.tensor([1, 2])
T = torch.tensor(0.5)
CONSTANT = ConstantGuidance(1.0)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: ConstantGuidance(-1.1), "scale"),
        (lambda: ConstantGuidance(math.nan), "scale"),
        (lambda: PowerCosineGuidance(0.9, 1.0), "peak"),
        (lambda: PowerCosineGuidance(2.0, 0.0), "power"),
        (lambda: guided(ClassModel(), LABELS.float(), 0, CONSTANT), "y"),
        (lambda: guided(ClassModel(), LABELS[None], 0, CONSTANT), "y"),
        (lambda: guided(ClassModel(), LABELS, 0, CONSTANT, interval=(2, 3)), "interval"),
        (lambda: guided(ClassModel(), LABELS, 0, CONSTANT, interval=(-2, 0.5)), "interval"),
        (lambda: guided(ClassModel(), LABELS, 0, CONSTANT)(X[:1], T), "x"),
        (lambda: guided(ClassModel(), LABELS, 0, CONSTANT)(X, T.expand(3)), "t"),
        (lambda: guided(lambda x, c, y: x[:2], LABELS, 0, CONSTANT)(X, T), "model_fn"),
    ],
)
def test_bad_arguments_of_guidance_are_named(call: Callable[[], object], argument: str) -> None:
    assert_argument_is_named(call, argument)


X0 = torch.zeros(2, 3, 8, 8)
SCHEDULE = DiscreteSchedule()


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: guided(ClassModel(), 1, 0, CONSTANT), "y"),
        (lambda: SCHEDULE.condition(5), "step"),
        (lambda: SCHEDULE.add_noise(X0, X0, 5), "step"),
        (lambda: SCHEDULE.add_noise(X0, 0.5, torch.tensor([1, 2])), "noise"),
        (lambda: SCHEDULE.add_noise(0.5, X0, torch.tensor([1, 2])), "x0"),
        (lambda: multi_scale_loss([X0], 0.5), "noise"),
        (lambda: multi_scale_loss([0.5], X0), r"predictions\[0\]"),
        *((lambda solve=solve: solve(None, 0.5, SCHEDULE, 4), "x") for solve in SOLVERS.values()),
    ],
)
def test_numbers_in_place_of_tensors_are_errors(call: Callable[[], object], argument: str) -> None:
    with pytest.raises(TypeError, match=rf"^{argument}: got (int|float), expected a tensor"):
        call()
