"""Noise levels of training: their distribution, their signal-to-noise ratio and their weight."""

import math
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dimr_fast.diffusion import Schedule, multi_scale_loss, noise_schedule
from dimr_fast.training import TrainConfig
from dimr_fast.training.objective import NoisePrediction

SCHEDULES = ("discrete", "vp-sde")


def continuous(schedule: Schedule, times: Tensor) -> list[float]:
    """Return times as solvers pass them."""
    scale = 1 if times.is_floating_point() else 1000
    return [max(t / scale, schedule.min_time) for t in times.tolist()]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("mean", "std"), [(0.5, 1.2), (0.0, 1.0), (-1.0, 0.3)])
def test_log_signal_to_noise_ratios_are_normal(name: Any, mean: float, std: float) -> None:
    schedule = noise_schedule(name)
    torch.manual_seed(0)
    times = schedule.draw_normal(4000, mean, std)
    assert times.dtype == schedule.draw(1).dtype
    drawn = sorted(schedule.half_log_snr(t) for t in continuous(schedule, times))
    ends = schedule.half_log_snr(1), schedule.half_log_snr(schedule.min_time)
    normal = NormalDist(mean, std)
    # Kolmogorov and Smirnov's distance, between the ends to which values are limited.
    distance = max(
        abs((i + 0.5) / len(drawn) - normal.cdf(value))
        for i, value in enumerate(drawn)
        if ends[0] + 0.1 < value < ends[1] - 0.5
    )
    assert distance < 1.63 / math.sqrt(len(drawn))  # exceeded by chance once in a hundred draws
    schedule.add_noise(torch.zeros(4000, 1), torch.zeros(4000, 1), times)


@pytest.mark.parametrize("name", SCHEDULES)
def test_they_are_limited_to_the_schedule(name: Any) -> None:
    schedule = noise_schedule(name)
    first, last = schedule.draw_normal(3, 1e3, 1.0), schedule.draw_normal(3, -1e3, 1.0)
    assert continuous(schedule, first) == pytest.approx([schedule.min_time] * 3, rel=1e-5)
    assert continuous(schedule, last) == pytest.approx([1.0] * 3)


@pytest.mark.parametrize(("mean", "std"), [(math.nan, 1.0), (0.0, 0.0), (0.0, math.inf)])
def test_an_error_names_a_distribution_that_does_not_exist(mean: float, std: float) -> None:
    with pytest.raises(ValueError, match=f"mean, std: got {mean}, {std}, expected"):
        noise_schedule("discrete").draw_normal(1, mean, std)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_signal_to_noise_ratio_is_that_of_the_inputs(name: Any) -> None:
    schedule = noise_schedule(name)
    times = schedule.draw(64)
    shape = (64, 1)
    alpha = schedule.add_noise(torch.ones(shape).double(), torch.zeros(shape).double(), times)
    sigma = schedule.add_noise(torch.zeros(shape).double(), torch.ones(shape).double(), times)
    ratios = schedule.snr(times)
    assert ratios.dtype == torch.float64
    torch.testing.assert_close(ratios, (alpha / sigma).square()[:, 0], rtol=1e-9, atol=0)


def test_the_signal_to_noise_ratio_has_its_range() -> None:
    assert noise_schedule("vp-sde").snr(torch.zeros(1)).item() == math.inf
    with pytest.raises(ValueError, match=r"t: got values in 2\.0\.\.2\.0"):
        noise_schedule("vp-sde").snr(torch.tensor([2.0]))
    with pytest.raises(ValueError, match=r"step: got values in 0\.\.0, expected 1\.\.1000"):
        noise_schedule("discrete").snr(torch.tensor([0]))


class Zero(nn.Module):
    """Predicts no noise, so that the loss of an image is the mean square of its noise."""

    def forward(self, x: Tensor, log_snr: Tensor, y: Tensor) -> list[Tensor]:
        return [torch.zeros_like(x)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_weight_is_limited_where_there_is_little_noise(name: Any) -> None:
    schedule = noise_schedule(name)
    x0, noise = torch.randn(2, 5, 3, 4, 4).unbind()
    steps = torch.tensor([1, 50, 200, 500, 1000])
    times = steps if name == "discrete" else steps / 1000
    arguments = (Zero(), x0, torch.zeros(5, dtype=torch.int64), times, noise)
    plain = NoisePrediction(schedule, torch.device("cpu"), torch.float32).loss(*arguments)
    torch.testing.assert_close(plain, multi_scale_loss([torch.zeros_like(noise)], noise))
    weighted = NoisePrediction(schedule, torch.device("cpu"), torch.float32, min_snr=5.0).loss(
        *arguments
    )
    ratios = [math.exp(2 * schedule.half_log_snr(t)) for t in continuous(schedule, times)]
    expected = torch.tensor([min(ratio, 5.0) / ratio for ratio in ratios])
    assert expected[0] < 0.01
    assert expected[-1] == 1
    torch.testing.assert_close(weighted / plain, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"half_log_snr": (0.0, 0.0)},
        {"half_log_snr": (math.inf, 1.0)},
        {"min_snr": 0.0},
        {"min_snr": math.inf},
        {"half_log_snr": (0.0, 1.0), "teacher": "teacher"},
        {"min_snr": 5.0, "teacher": "teacher"},
    ],
)
def test_a_run_refuses_other_settings(tmp_path: Any, changes: dict[str, Any]) -> None:
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"{name}: got .*none with a teacher"):
        TrainConfig(output=tmp_path, **changes).validate()
