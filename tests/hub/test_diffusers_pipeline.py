"""The pipeline against our sampler, and what a user of diffusers expects of a pipeline."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dimr_fast.checkpoint import TrainedModel, demo_model, load_model, save_model
from dimr_fast.data.autoencoder import Autoencoder
from dimr_fast.data.scaling import LatentScale
from dimr_fast.sampling import ImageSampler, SamplerConfig
from tests.support.models import write_checkpoint
from tests.support.pipelines import LABELS, autoencoder, generators, published_pixels, tiny

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: hub)")
ours = pytest.importorskip("dimr_fast.diffusers", reason="needs diffusers (extra: hub)")


def pipeline(trained: TrainedModel, **components: Any) -> Any:
    """Return a pipeline that computes in float32 and shows no progress."""
    pipe = ours.DiMRPipeline(ours.DiMRModel(trained), **components).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(images: list[Any]) -> Tensor:
    """Return PIL images as uint8 [N, 3, H, W]."""
    return torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2)


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_the_packaged_model_draws_as_by_our_sampler(precision: Any) -> None:
    """Nothing is set: solver, steps, limit of the noise and clipping are the model's defaults."""
    expected = ImageSampler(load_model(demo_model()), SamplerConfig(precision=precision))
    pipe = ours.DiMRPipeline.from_pretrained(demo_model())
    if precision == "fp32":
        pipe.to(torch.float32)
    images = pipe(LABELS, generator=generators()).images
    assert torch.equal(pixels(images), expected(torch.tensor(LABELS)))


@pytest.mark.parametrize(
    ("trained", "settings", "arguments"),
    [
        (published_pixels(), {"defaults": "published", "steps": 12}, {"num_inference_steps": 12}),
        (tiny(evaluations=2), {}, {}),
        (tiny(), {"guidance": 1.5, "steps": 4}, {"guidance_scale": 2.5, "num_inference_steps": 4}),
        (tiny(), {"guidance": -1.0}, {"guidance_scale": 0.0}),
    ],
    ids=["published", "distilled", "guided", "without class"],
)
def test_images_are_those_of_our_sampler(
    trained: TrainedModel, settings: dict[str, Any], arguments: dict[str, Any]
) -> None:
    if "defaults" in settings:
        trained = dataclasses.replace(trained, defaults="published")
    expected = ImageSampler(trained, SamplerConfig(precision="fp32", seed=3, **settings))
    images = pipeline(trained)(LABELS, generator=generators(seed=3), **arguments).images
    assert torch.equal(pixels(images), expected(torch.tensor(LABELS)))


@pytest.mark.parametrize("shift", [None, 0.1])
def test_latents_are_decoded_as_by_our_sampler(shift: float | None, tmp_path: Path) -> None:
    trained = tiny(channels=4)
    vae = autoencoder(tmp_path / "vae", shift_factor=shift)
    expected = ImageSampler(trained, SamplerConfig(precision="fp32"), Autoencoder(vae).decode)
    images = pipeline(trained, vae=vae)(LABELS, generator=generators()).images
    assert images[0].size == (128, 128)
    assert torch.equal(pixels(images), expected(torch.tensor(LABELS)))


def test_forms_of_the_output() -> None:
    pipe = pipeline(tiny())
    found = {
        name: pipe(LABELS, generator=generators(), output_type=name, return_dict=False)[0]
        for name in ("pil", "np", "pt", "latent")
    }
    in_bytes = pixels(found["pil"])
    assert torch.equal((255 * found["pt"]).round().byte(), in_bytes)
    assert np.array_equal(found["np"], found["pt"].permute(0, 2, 3, 1).numpy())
    scale = pipe.transformer.trained.scale
    assert torch.equal(scale.to_pixels(found["latent"]), in_bytes)


def test_one_generator_draws_the_noise_of_all_images() -> None:
    pipe = pipeline(tiny())

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pipe(LABELS, generator=generator, output_type="latent").images

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_class_names_have_labels() -> None:
    pipe = ours.DiMRPipeline.from_pretrained(demo_model())
    assert pipe.get_label_ids(["tropic coast", "polar coast"]) == [2, 0]
    assert pipe.get_label_ids("polar inland") == [3]
    with pytest.raises(
        ValueError, match="label: got 'tropic', expected a class of the model, such as tropic coast"
    ):
        pipe.get_label_ids(["tropic"])


def test_callbacks_see_and_replace_the_state() -> None:
    pipe = pipeline(tiny())
    seen: list[tuple[int, float]] = []

    def zero(given: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Any:
        assert given is pipe
        assert tensors["latents"].shape == (3, 3, 16, 16)
        seen.append((step, timestep.item()))
        return {"latents": torch.zeros_like(tensors["latents"])}

    images = pipe(
        LABELS, num_inference_steps=4, callback_on_step_end=zero, output_type="latent"
    ).images
    assert not images.any()
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    times = [timestep for _, timestep in seen]
    assert times[0] == 999
    assert times == sorted(times, reverse=True)


def test_a_callback_ends_the_sampling() -> None:
    pipe, steps = pipeline(tiny()), []

    def stop(given: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Any:
        steps.append(step)
        vars(given)["_interrupt"] = step == 1  # as the pages of diffusers say
        return tensors

    pipe(LABELS, callback_on_step_end=stop)
    pipe(LABELS, callback_on_step_end=stop)
    assert steps == [0, 1, 0, 1]


def test_a_bar_shows_the_progress() -> None:
    pipe, text = pipeline(tiny()), io.StringIO()
    pipe.set_progress_bar_config(file=text)
    pipe(LABELS, num_inference_steps=5)
    assert "5/5" in text.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": []}, r"class_labels: got \[\], expected labels in 0..6"),
        ({"class_labels": [7]}, r"class_labels: got \[7\], expected labels in 0..6"),
        ({"class_labels": [1.0]}, "class_labels: .*expected"),
        ({"class_labels": ["a"]}, "class_labels: .*see get_label_ids for names"),
        ({"num_inference_steps": 0}, "num_inference_steps: got 0, expected"),
        ({"guidance_scale": -0.5}, "guidance_scale: got -0.5, expected"),
        ({"generator": generators(2)}, "generator: .*a list of 3"),
        ({"output_type": "jpeg"}, "output_type: got 'jpeg', expected one of"),
        (
            {"callback_on_step_end_tensor_inputs": ["noise"]},
            "callback_on_step_end_tensor_inputs: got 'noise', expected only latents",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(tiny())(**({"class_labels": LABELS} | arguments))


def test_a_distilled_model_refuses_other_settings() -> None:
    pipe = pipeline(tiny(evaluations=2))
    with pytest.raises(ValueError, match=r"num_inference_steps: got 8, expected 2, which the"):
        pipe(LABELS, num_inference_steps=8)
    with pytest.raises(ValueError, match=r"guidance_scale: got 2.0, expected 1: the model was"):
        pipe(LABELS, guidance_scale=2.0)
    config = pipe.scheduler.config
    pipe.scheduler = diffusers.DDIMScheduler.from_config(config)
    with pytest.raises(ValueError, match=r"scheduler: .*expected DiMRScheduler: the model is"):
        pipe(LABELS)
    pipe.scheduler = ours.DiMRScheduler.from_config(config, solver="heun")
    with pytest.raises(ValueError, match=r"scheduler: .*solver heun.*expected solver ddim"):
        pipe(LABELS)


def test_an_autoencoder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    vae = autoencoder(tmp_path)
    with pytest.raises(ValueError, match="vae: got 'AutoencoderKL', expected None"):
        pipeline(tiny(), vae=vae)(LABELS)
    with pytest.raises(ValueError, match="vae: got None, expected an AutoencoderKL"):
        pipeline(tiny(channels=4))(LABELS)
    with pytest.raises(ValueError, match=r"vae: got .*0.18215.*expected the model's 4.*0.5"):
        pipeline(tiny(channels=4, scale=LatentScale(0.5)), vae=vae)(LABELS)
    assert len(pipeline(tiny(channels=4))(LABELS, output_type="latent").images) == 3


def test_images_that_are_not_finite_are_refused() -> None:
    pipe = pipeline(tiny())
    with torch.no_grad():
        next(pipe.transformer.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="images: not finite"):
        pipe(LABELS)


def test_the_model_is_optimised_once_and_again_after_a_change(tmp_path: Path) -> None:
    pipe = pipeline(tiny())

    def draw() -> Tensor:
        return pipe(LABELS, generator=generators(), output_type="latent").images

    first = draw()
    for layer in pipe.transformer.modules():
        layer.register_forward_hook(lambda module, *_: called.append(type(module).__name__))
    called: list[str] = []
    draw()
    assert set(called) == {"DiMRModel"}  # the copy computes, not the model's layers
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(0.9)
    assert not torch.equal(draw(), first)


def test_a_model_with_other_layers_is_called_itself() -> None:
    """Adapters replace layers."""

    class Doubled(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.layer(x)

    trained = tiny()
    pipe = pipeline(trained)

    def draw() -> Tensor:
        return pipe(LABELS, generator=generators(), output_type="latent").images

    before = draw()
    parent = trained.model.get_submodule("stages.0.blocks.0.block1")
    layer = parent.query_key_value
    with torch.no_grad():
        layer.weight.mul_(0.5)
    parent.query_key_value = Doubled(layer)
    torch.testing.assert_close(draw(), before, rtol=1e-4, atol=1e-4)


def test_checkpoints_and_model_folders_become_pipelines(tmp_path: Path) -> None:
    trained = tiny()
    expected = pipeline(trained)(LABELS, generator=generators(), output_type="latent").images
    write_checkpoint(trained, tmp_path / "checkpoint.safetensors")
    save_model(trained, tmp_path / "folder")
    for path in (tmp_path / "checkpoint.safetensors", str(tmp_path / "folder")):
        pipe = ours.DiMRPipeline.from_pretrained(path, dtype=torch.float32)
        images = pipe(LABELS, generator=generators(), output_type="latent").images
        assert torch.equal(images, expected)
