"""Drawing images from a trained model in memory."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from dimr_fast.checkpoint import TrainedModel
from dimr_fast.data.scaling import LatentScale, PixelScale
from dimr_fast.diffusion import SOLVERS
from dimr_fast.sampling import ImageSampler, SamplerConfig, balanced_labels, sample_images
from tests.support.models import trained_model


@pytest.fixture
def trained() -> TrainedModel:
    return trained_model()


def test_an_image_does_not_depend_on_its_batch(trained: TrainedModel) -> None:
    labels = torch.arange(5)
    sampler = SamplerConfig(steps=4, precision="fp32")
    together = sample_images(trained, labels, sampler)
    apart = sample_images(trained, labels, dataclasses.replace(sampler, batch_size=2))
    last = sample_images(trained, labels[3:], sampler, first=3)
    assert together.dtype == torch.uint8
    assert together.shape == (5, 3, 16, 16)
    # A batch of another size may take another order of summation, never more than a rounding.
    assert (together.int() - apart.int()).abs().max() <= 1
    assert (together[3:].int() - last.int()).abs().max() <= 1
    other = sample_images(trained, labels, dataclasses.replace(sampler, seed=1))
    assert (together.int() - other.int()).abs().float().mean() > 1


def watch_inputs(draw: ImageSampler) -> list[torch.Tensor]:
    """Return a list to which each call of the network appends its input."""
    seen: list[torch.Tensor] = []
    draw.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    return seen


@pytest.mark.parametrize(("guidance", "batch"), [(0.4, 6), (0.0, 3)])
def test_each_step_is_one_network_evaluation(
    trained: TrainedModel, guidance: float, batch: int
) -> None:
    draw = ImageSampler(trained, SamplerConfig(steps=5, guidance=guidance))
    seen = watch_inputs(draw)
    draw(torch.arange(3))
    assert [len(x) for x in seen] == [batch] * 5


def initial_noise(trained: TrainedModel, **settings: Any) -> torch.Tensor:
    """Return the input of the network's first evaluation."""
    decode = (lambda z: z) if isinstance(trained.scale, LatentScale) else None
    sampler = SamplerConfig(steps=1, guidance=0.0, precision="fp32", **settings)
    draw = ImageSampler(trained, sampler, decode)
    seen = watch_inputs(draw)
    draw(torch.arange(6))
    return seen[0]


def test_initial_noise_is_limited_for_pixels_only(trained: TrainedModel) -> None:
    limited = initial_noise(trained)
    drawn = initial_noise(trained, noise_limit=math.inf)
    latents = dataclasses.replace(trained, scale=LatentScale())
    assert torch.equal(drawn, initial_noise(latents))
    assert limited.abs().max() == 2.5
    assert drawn.abs().max() > 3
    assert torch.equal(limited, drawn.clamp(-2.5, 2.5))
    assert abs(drawn.mean().item()) < 0.05
    assert abs(drawn.std().item() - 1) < 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_changes_no_image(trained: TrainedModel, dtype: torch.dtype) -> None:
    sampler = SamplerConfig(steps=4, precision="fp32", guidance=1.0, guidance_power=2.0)
    expected = sample_images(trained, torch.arange(3), sampler)
    torch.set_default_dtype(dtype)
    try:
        found = sample_images(trained, torch.arange(3), sampler)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_no_images_for_no_labels(trained: TrainedModel) -> None:
    assert sample_images(trained, torch.empty(0, dtype=torch.int64), SamplerConfig()).shape == (
        0,
        3,
        16,
        16,
    )


def test_labels_out_of_range_are_named(trained: TrainedModel) -> None:
    for label in (7, -1):
        with pytest.raises(ValueError, match=rf"labels: got {label}, expected 0\.\.6"):
            sample_images(trained, torch.tensor([0, label]), SamplerConfig())
    with pytest.raises(ValueError, match=r"labels: got torch\.float32"):
        sample_images(trained, torch.zeros(2), SamplerConfig())


def test_pixel_scale_inverts_itself() -> None:
    images = torch.arange(256, dtype=torch.uint8)
    scale = PixelScale.of(images)
    values = scale.to_model(images)
    assert abs(values.mean().item()) < 1e-3
    assert abs(values.std().item() - 1) < 1e-3
    assert torch.equal(scale.to_pixels(values), images)
    assert scale.range == pytest.approx((values[0].item(), values[-1].item()))
    assert scale.to_pixels(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_draws_different_images(trained: TrainedModel, solver: Any) -> None:
    labels = torch.arange(2)
    drawn = sample_images(trained, labels, SamplerConfig(solver=solver, steps=6, precision="fp32"))
    other = "heun" if solver == "ddim" else "ddim"
    differing = sample_images(
        trained, labels, SamplerConfig(solver=other, steps=6, precision="fp32")
    )
    assert drawn.shape == (2, 3, 16, 16)
    assert not torch.equal(drawn, differing)


def test_guidance_settings_reach_the_model(trained: TrainedModel) -> None:
    images: dict[str, torch.Tensor] = {}
    for name, settings in {
        "none": {"guidance": 0.0},
        "constant": {"guidance": 4.0},
        "power": {"guidance": 4.0, "guidance_power": 2.0},
        "never": {"guidance": 4.0, "guidance_interval": (0.1, 0.2)},
        "late": {"guidance": 4.0, "guidance_interval": (0.0, 0.6)},
    }.items():
        sampler = SamplerConfig(steps=4, precision="fp32", **settings)  # type: ignore[arg-type]
        draw = ImageSampler(trained, sampler)
        seen = watch_inputs(draw)
        images[name] = draw(torch.arange(3))
        # four times: 1, 0.75, 0.5 and 0.25
        expected = {"none": [3] * 4, "never": [3] * 4, "late": [3, 3, 6, 6]}
        assert [len(x) for x in seen] == expected.get(name, [6] * 4)
    assert torch.equal(images["none"], images["never"])
    distinct = [images[name] for name in ("none", "constant", "power", "late")]
    assert len({image.numpy().tobytes() for image in distinct}) == 4


def test_power_guidance_grows_to_the_constant_one() -> None:
    constant = SamplerConfig(guidance=0.4).guidance_schedule()
    power = SamplerConfig(guidance=0.4, guidance_power=2.0).guidance_schedule()
    t = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    assert constant.extra(t).tolist() == pytest.approx([0.4] * 3)
    middle = 0.2 * (1 - math.cos(math.pi / 4))
    assert power.extra(t).tolist() == pytest.approx([0.0, middle, 0.4])


def test_an_image_sampler_uses_one_network_for_all_calls(trained: TrainedModel) -> None:
    sampler = SamplerConfig(steps=2, precision="fp32", batch_size=2)
    draw = ImageSampler(trained, sampler)
    seen = watch_inputs(draw)
    apart = torch.cat([draw(torch.arange(2)), draw(torch.arange(2, 4), first=2)])
    assert len(seen) == 4
    assert draw.network.dtype == torch.float32
    assert torch.equal(apart, sample_images(trained, torch.arange(4), sampler))


def test_the_recipe_states_automatic_settings(trained: TrainedModel) -> None:
    cpu = torch.device("cpu")
    pixels = SamplerConfig().recipe(trained, cpu)
    assert (pixels["solver"], pixels["spacing"]) == ("DPM-Solver++ multistep, order 2", "log_snr")
    assert pixels["precision"] in ("fp32", "bf16")
    assert (pixels["noise_limit"], pixels["steps"], pixels["seed"]) == (2.5, 8, 0)
    assert pixels["guidance"] == 0
    latents = SamplerConfig().recipe(dataclasses.replace(trained, scale=LatentScale()), cpu)
    assert (latents["noise_limit"], latents["clip"]) == ("none", "none")
    assert (latents["solver"], latents["spacing"]) == ("DPM-Solver++ single-step, order 3", "time")
    assert (latents["steps"], latents["guidance"]) == (25, 1.0)
    assert json.loads(json.dumps(pixels, allow_nan=False)) == pixels


@pytest.mark.parametrize("changes", [{"guidance_power": 4.0}, {"guidance_interval": (0.2, 0.8)}])
def test_the_times_of_guidance_need_its_strength(
    trained: TrainedModel, changes: dict[str, Any]
) -> None:
    """Without guidance, the default for pixels, they would do nothing."""
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="guidance: got None, expected a number with guidance_po"):
        SamplerConfig(**changes).resolved(trained, cpu)
    assert SamplerConfig(guidance=0.5, **changes).resolved(trained, cpu).guidance == 0.5
    latents = dataclasses.replace(trained, scale=LatentScale())
    assert SamplerConfig(**changes).resolved(latents, cpu).guidance == 1


@pytest.mark.parametrize(("count", "classes"), [(1, 1), (6, 3), (50, 7), (3, 10), (1003, 1000)])
def test_labels_are_balanced(count: int, classes: int) -> None:
    labels = balanced_labels(count, classes)
    assert (labels.dtype, len(labels)) == (torch.int64, count)
    found = labels.bincount(minlength=classes)
    assert len(found) == classes
    assert found.max() - found.min() <= (count % classes > 0)
    rest = labels[count // classes * classes :]
    if len(rest) > 1:  # spread evenly over the classes
        gaps = rest.diff()
        assert gaps.max() - gaps.min() <= 1
        assert 0 < classes - rest[-1] <= gaps.max() + 1


def test_labels_need_a_count_and_classes() -> None:
    with pytest.raises(ValueError, match="got 0, 5, expected 1 or more"):
        balanced_labels(0, 5)
