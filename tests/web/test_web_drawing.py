"""Drawing for the page: entries, previews, the command, threads; without Gradio."""

import math
import shlex
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from dimr_fast import cli
from dimr_fast.checkpoint import TrainedModel, save_model
from dimr_fast.data.scaling import PixelScale
from dimr_fast.diffusion import DiscreteSchedule
from dimr_fast.inference.optimize import InferenceDiMR
from dimr_fast.sampling import ImageSampler, SamplerConfig, sample_images
from dimr_fast.web.drawing import Drawing, Preview, Studio, sample_command
from tests.support.models import trained_model

ENTRIES: dict[str, Any] = {
    "classes": [],
    "count": 5,
    "seed": 3,
    "solver": "dpm++2m",
    "steps": 4,
    "guidance": 0.5,
    "low": 0.0,
    "high": 1.0,
}
NAMES = ("sea", "polar coast", "-ice", "it's", "wood", "town")


def studio(folder: Path, **changes: Any) -> Studio:
    """Return a studio of a tiny model that is saved in `folder`; `changes` are facts of it."""
    tiny = trained_model()
    trained = TrainedModel(tiny.model, NAMES, tiny.scale, **changes)
    save_model(trained, folder / "model")
    return Studio(folder / "model", precision="fp32")


@pytest.fixture(scope="module")
def drawn_by(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return studio(tmp_path_factory.mktemp("studio"))


def drawing_of(studio: Studio, **changes: Any) -> Drawing:
    *_, last = studio.draw(studio.job(**(ENTRIES | changes)))
    assert isinstance(last, Drawing)
    return last


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("classes", ["sea", "desert"], "classes: got 'desert', expected a class of this model"),
        ("classes", None, "classes: got nothing, expected a list of names"),
        ("classes", "sea", "classes: got 'sea', expected a list of names"),
        ("classes", [["sea"]], "classes: got"),
        ("count", 0, "images: got 0, expected a whole number from 1 to 64"),
        ("count", 65, "images: got 65"),
        ("count", 1e300, "images: got 1e"),
        ("count", 2.5, "images: got 2.5"),
        ("count", "5", "images: got '5'"),
        ("count", True, "images: got True"),
        ("count", math.nan, "images: got nan"),
        ("seed", -1, "seed: got -1"),
        ("seed", 2**32, "seed: got 4294967296, expected a whole number from 0 to 4294967295"),
        ("seed", None, "seed: got nothing"),
        ("solver", "rk4", "solver: got 'rk4', expected one of dpm\\+\\+, "),
        ("solver", ["ddim"], "solver: got"),
        ("solver", "x" * 10**6, "solver: got .{1,80}, expected"),
        ("steps", 251, "network evaluations: got 251, expected a whole number from 1 to 250"),
        ("steps", math.inf, "network evaluations: got inf"),
        ("guidance", -1.5, "guidance: got -1.5, expected a number from -1 to 20"),
        ("guidance", math.nan, "guidance: got nan"),
        ("low", -0.1, "guided from time: got -0.1, expected a number from 0 to 1"),
        ("high", "1", "to time: got '1'"),
        ("high", {}, "to time: got {}"),
    ],
)
def test_an_entry_out_of_range_is_refused_in_words(
    drawn_by: Studio, entry: str, value: object, words: str
) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        drawn_by.job(**(ENTRIES | {entry: value}))


def test_an_interval_that_ends_before_it_begins_is_refused(drawn_by: Studio) -> None:
    with pytest.raises(ValueError, match=r"guided from time: got 0\.8, expected at most 0\.2"):
        drawn_by.job(**(ENTRIES | {"low": 0.8, "high": 0.2}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"classes": ["-ice", "polar coast", "it's"], "low": 0.2, "high": 0.75},
        {"classes": ["none"], "solver": "euler-maruyama", "guidance": 0.0},
        {"solver": "heun", "steps": 3.0, "guidance": -1, "seed": 2**32 - 1},
    ],
    ids=["all classes", "some classes", "without class", "guidance -1"],
)
def test_the_command_draws_the_same_images(
    drawn_by: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    drawing = drawing_of(drawn_by, **changes)
    command = sample_command(drawn_by.job(**(ENTRIES | changes)))
    monkeypatch.chdir(tmp_path)
    program, *words = shlex.split(command)
    assert (program, cli.main(words)) == ("dimr-fast", 0)
    with np.load(tmp_path / "samples" / "samples.npz") as file:
        assert np.array_equal(file["arr_0"], drawing.images.permute(0, 2, 3, 1))
        assert np.array_equal(file["arr_1"], drawing.labels)


def test_previews_come_before_the_images_and_do_not_change_them(drawn_by: Studio) -> None:
    job = drawn_by.job(**(ENTRIES | {"steps": 20}))
    *previews, drawing = drawn_by.draw(job)
    assert isinstance(drawing, Drawing)
    assert [p.evaluation for p in previews if isinstance(p, Preview)] == [3, 6, 9, 12, 15, 18]
    assert all(p.images.shape == (5, 3, 16, 16) for p in previews)
    alone = sample_images(drawn_by.trained, drawing.labels, job.sampler)
    assert torch.equal(drawing.images, alone)
    assert drawing.seconds > 0


def test_a_preview_is_the_image_that_the_network_predicts(drawn_by: Studio) -> None:
    """That of the first evaluation is computed here from the noise alone."""
    trained, seen = drawn_by.trained, []
    settings = SamplerConfig(solver="ddim", spacing="time", steps=3, precision="fp32", clip=False)
    noise = []
    sampler = ImageSampler(trained, settings)
    sampler.network.register_forward_pre_hook(lambda module, inputs: noise.append(inputs[0]))
    sampler(torch.tensor([1, 4]), watch=lambda evaluation, images: seen.append(images()))
    schedule = DiscreteSchedule()
    alpha, sigma = schedule.alpha_sigma(1.0)
    log_snr = schedule.condition_at(torch.ones(1))
    with torch.no_grad():
        predicted = trained.model(noise[0], log_snr=log_snr, y=torch.tensor([1, 4]))[-1]
    assert isinstance(trained.scale, PixelScale)
    image = (noise[0] - sigma * predicted) / alpha * trained.scale.std + trained.scale.mean
    assert len(seen) == 3
    # At t = 1 the noise is divided by a small α, which enlarges rounding errors.
    expected = image.round().clamp(0, 255)
    assert ((seen[0] - expected).abs() <= 1).float().mean() > 0.98


def test_a_drawing_that_nobody_waits_for_ends_early(drawn_by: Studio) -> None:
    calls = []

    def count(module: torch.nn.Module, inputs: object, outputs: object) -> None:
        if isinstance(module, InferenceDiMR):
            calls.append(module)

    hook = register_module_forward_hook(count)
    try:
        updates = drawn_by.draw(drawn_by.job(**(ENTRIES | {"steps": 250, "guidance": 0})))
        next(updates)
        updates.close()
        drawing_of(drawn_by, steps=1, guidance=0)
    finally:
        hook.remove()
    assert len(calls) < 200


def test_threads_draw_one_after_the_other(drawn_by: Studio) -> None:
    expected = [drawing_of(drawn_by, seed=seed, count=1).images for seed in range(8)]
    found: dict[int, torch.Tensor] = {}

    def draw(seed: int) -> None:
        found[seed] = drawing_of(drawn_by, seed=seed, count=1).images

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(8))


def test_an_error_of_the_model_reaches_the_page(tmp_path: Path) -> None:
    broken = studio(tmp_path)
    *_, good = broken.draw(broken.job(**ENTRIES))
    assert isinstance(good, Drawing)
    hook = register_module_forward_hook(
        lambda module, inputs, outputs: (
            [output * math.nan for output in outputs] if isinstance(module, InferenceDiMR) else None
        )
    )
    try:
        with pytest.raises(FloatingPointError, match="not finite"):
            list(broken.draw(broken.job(**ENTRIES)))
    finally:
        hook.remove()
    assert torch.equal(drawing_of(broken).images, good.images)


def test_a_distilled_model_is_offered_with_its_own_settings_only(tmp_path: Path) -> None:
    student = studio(tmp_path, evaluations=2)
    own = {"solver": "ddim", "steps": 2, "guidance": 0.0}
    assert student.fixed
    assert student.class_names == NAMES
    defaults = student.defaults
    assert (defaults.solver, defaults.steps, defaults.guidance) == ("ddim", 2, 0.0)
    assert len(drawing_of(student, **own).images) == 5
    for other in ({"solver": "heun"}, {"steps": 3}, {"guidance": 1.0}, {"classes": ["none"]}):
        with pytest.raises(ValueError, match=r"distilled for 2 evaluations|a class of this model"):
            student.job(**(ENTRIES | own | other))


def test_classes_have_rows_and_one_class_has_a_block(drawn_by: Studio) -> None:
    images = torch.arange(8, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    grid, names = drawn_by.arrange(images[:5], torch.tensor([4, 1, 4, 1, 4]))
    assert names == ["wood", "polar coast"]
    assert grid[:, :, 0, 0, 0].tolist() == [[0, 2, 4], [1, 3, 255]]
    grid, names = drawn_by.arrange(images, torch.full((8,), 6))
    assert names == ["none", "", ""]
    assert grid[:, :, 0, 0, 0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 255]]


def test_a_sampler_with_other_settings_shares_the_network() -> None:
    trained = trained_model()
    first = ImageSampler(trained, SamplerConfig(steps=2, precision="fp32"))
    second = first.with_settings(SamplerConfig(steps=3, precision="fp32", seed=1))
    assert second.network is first.network
    assert (first.settings.steps, second.settings.steps) == (2, 3)
    labels = torch.tensor([0, 5])
    alone = sample_images(trained, labels, SamplerConfig(steps=3, precision="fp32", seed=1))
    assert torch.equal(second(labels), alone)
    with pytest.raises(ValueError, match=r"precision: got 'bf16', expected fp32"):
        first.with_settings(SamplerConfig(precision="bf16"))
    with pytest.raises(ValueError, match="steps: got 0"):
        first.with_settings(SamplerConfig(steps=0))
