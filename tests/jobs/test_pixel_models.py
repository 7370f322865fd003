"""Training and sampling with the schedule of published pixel models."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from dimr_fast import DiMR
from dimr_fast.checkpoint import CheckpointError, TrainedModel, load_model
from dimr_fast.data.scaling import LatentScale, PixelScale
from dimr_fast.sampling import ImageSampler, SamplerConfig, sample_images
from dimr_fast.training import CHECKPOINT, TrainConfig, train
from tests.support.models import trained_model
from tests.support.training import PlainImages, same_tensors, small_run, train_on_plain_images


def log_snr(t: float) -> float:
    """Return log(α²/σ²) of β(t) = 0.1 + 19.9·t."""
    return -math.log(math.expm1(0.1 * t + 9.95 * t * t))


@pytest.fixture
def pixels() -> TrainedModel:
    return dataclasses.replace(trained_model(), scale=PixelScale(127.5, 127.5), schedule="vp-sde")


def watch_conditions(draw: ImageSampler) -> list[float]:
    """Return a list to which each call of the network appends its condition."""
    seen: list[float] = []

    def record(_: nn.Module, inputs: Any, keywords: dict[str, torch.Tensor]) -> None:
        seen.append(keywords["log_snr"].item())

    draw.network.register_forward_pre_hook(record, with_kwargs=True)
    return seen


@pytest.mark.parametrize("solver", ["dpm++", "ddim", "euler", "euler-maruyama"])
def test_the_condition_is_the_log_snr_of_each_time(pixels: TrainedModel, solver: Any) -> None:
    draw = ImageSampler(
        pixels, SamplerConfig(solver=solver, spacing="time", steps=4, precision="fp32")
    )
    seen = watch_conditions(draw)
    draw(torch.arange(3))
    # Euler's points include 1/1000; the others stop at 1/10,000 without an evaluation there.
    last = 1e-3 if solver.startswith("euler") else 1e-4
    intervals = 3 if solver.startswith("euler") else 4
    times = [1 + (last - 1) * i / intervals for i in range(4)]
    assert seen == pytest.approx([log_snr(t) for t in times], rel=1e-4)


def test_a_stochastic_image_does_not_depend_on_its_batch(pixels: TrainedModel) -> None:
    sampler = SamplerConfig(solver="euler-maruyama", steps=6, precision="fp32")
    together = sample_images(pixels, torch.arange(5), sampler)
    apart = sample_images(pixels, torch.arange(5), dataclasses.replace(sampler, batch_size=2))
    last = sample_images(pixels, torch.arange(3, 5), sampler, first=3)
    assert (together.int() - apart.int()).abs().max() <= 1
    assert (together[3:].int() - last.int()).abs().max() <= 1
    other = sample_images(pixels, torch.arange(5), dataclasses.replace(sampler, seed=1))
    assert not torch.equal(together, other)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (8, 0.0, True, 2.5)),
        ({"clip": False}, (8, 0.0, False, 2.5)),
        ({"defaults": "published"}, (250, 0.4, False, math.inf)),
        ({"defaults": "published", "steps": 9, "clip": True}, (9, 0.4, True, math.inf)),
        ({"defaults": "published", "guidance": 0.0, "noise_limit": 3.0}, (250, 0.0, False, 3.0)),
    ],
)
def test_defaults_fill_in_what_is_not_given(
    settings: dict[str, Any], expected: tuple[object, ...]
) -> None:
    cpu = torch.device("cpu")
    found = SamplerConfig(**settings).resolved(trained_model(), cpu)
    assert (found.steps, found.guidance, found.clip, found.noise_limit) == expected
    # A model may remember them.
    remembered = dataclasses.replace(trained_model(), defaults=settings.get("defaults"))
    given = {name: value for name, value in settings.items() if name != "defaults"}
    again = SamplerConfig(**given).resolved(remembered, cpu)
    assert (again.steps, again.guidance, again.clip, again.noise_limit) == expected


def test_clipping_is_a_setting(pixels: TrainedModel) -> None:
    """Without it the network's inputs leave the range of pixels by far."""
    largest = {}
    for clip in (True, False):
        draw = ImageSampler(pixels, SamplerConfig(steps=6, precision="fp32", clip=clip))
        inputs: list[torch.Tensor] = []
        draw.network.register_forward_pre_hook(lambda _, x, inputs=inputs: inputs.append(x[0]))
        draw(torch.arange(3))
        largest[clip] = inputs[-1].abs().max().item()
    assert largest[False] > largest[True]
    latents = dataclasses.replace(pixels, scale=LatentScale())
    with pytest.raises(ValueError, match="clip: got True, expected False or None"):
        ImageSampler(latents, SamplerConfig(clip=True), decode=lambda z: z)


def test_a_run_trains_on_the_log_snr_of_pixels_from_minus_one_to_one(tmp_path: Path) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(_: nn.Module, inputs: Any, keywords: Any) -> None:
        if not inputs[0].is_meta:  # meta: FLOPs are counted
            seen.append((inputs[0].detach().clone(), keywords["log_snr"].clone()))

    def watch(module: nn.Module, _: Any) -> None:
        if isinstance(module, DiMR) and module not in watched:
            watched.append(module)
            module.register_forward_pre_hook(record, with_kwargs=True)

    watched: list[nn.Module] = []
    changes = {"schedule": "vp-sde", "pixel_scale": (127.5, 127.5), "batch_size": 60}
    run = small_run(tmp_path / "run", steps=40, **changes)
    hook = register_module_forward_pre_hook(watch)
    try:
        summary = train_on_plain_images(run)
    finally:
        hook.remove()
    assert summary.last_loss < summary.first_loss
    x, condition = (torch.cat(column) for column in zip(*seen, strict=True))
    t = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
    expected = -(0.1 * t + 9.95 * t * t).expm1().log()
    # Uniform times: the conditions have the distribution of the formula.
    for share in (0.1, 0.5, 0.9):
        assert condition.quantile(share).item() == pytest.approx(
            expected.quantile(share).item(), abs=0.6
        )
    # At little noise the inputs are the colours 0, 40, … 200 in −1..1.
    clean = x[condition > 6].mean(dim=(1, 2, 3))
    colours = torch.arange(6) * 40 / 127.5 - 1
    assert len(clean) > 20
    assert (clean[:, None] - colours).abs().min(dim=1).values.max() < 0.05
    trained = load_model(tmp_path / "run" / CHECKPOINT)
    assert (trained.schedule, trained.scale) == ("vp-sde", PixelScale(127.5, 127.5))
    assert sample_images(trained, torch.arange(2), SamplerConfig(steps=3)).shape == (2, 3, 16, 16)


def test_a_resumed_run_keeps_schedule_and_scale(tmp_path: Path) -> None:
    changes = {"schedule": "vp-sde", "pixel_scale": (127.5, 127.5), "decay": 0.0}
    train_on_plain_images(small_run(tmp_path / "whole", steps=4, **changes))
    run = small_run(tmp_path / "run", steps=2, **changes)
    train_on_plain_images(run)
    train_on_plain_images(dataclasses.replace(run, steps=4), resume=True)
    assert same_tensors(tmp_path / "run", tmp_path / "whole")
    for change in ({"schedule": "discrete"}, {"pixel_scale": None}):
        other = dataclasses.replace(run, steps=6, **change)
        with pytest.raises(CheckpointError, match=f"was trained with {next(iter(change))}"):
            train_on_plain_images(other, resume=True)


def test_settings_are_read_and_checked(tmp_path: Path) -> None:
    words = ["schedule=vp-sde", "pixel_scale=[127.5, 127.5]"]
    config = TrainConfig.read("demo", words, tmp_path)
    assert (config.schedule, config.pixel_scale) == ("vp-sde", (127.5, 127.5))
    for change, message in (
        ({"schedule": "cosine"}, "schedule: got 'cosine', expected one of discrete, vp-sde"),
        ({"pixel_scale": (0.0, -1.0)}, "pixel_scale: got"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **change).validate()  # type: ignore[arg-type]


def test_latents_have_their_own_scale(tmp_path: Path) -> None:
    examples = PlainImages()
    examples.scale = LatentScale()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"pixel_scale: got .*latents have their own scale"):
        train(small_run(tmp_path / "run", pixel_scale=(127.5, 127.5)), examples=examples)
