"""Tests of the ablation: its arms, their training, and the report."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.ablation import report as ablation_report
from benchmarks.ablation import run as ablation
from benchmarks.ablation.models import ARMS, AdaLNZeroBlock, PlainMLP
from benchmarks.ablation.run import Settings, TileBatches, TrainingRun
from benchmarks.model.flops import flops
from benchmarks.utils import machine
from dimr_fast import PRESETS, DiMR
from dimr_fast.checkpoint import load_checkpoint
from dimr_fast.data.tiles import Tiles
from dimr_fast.diffusion import multi_scale_loss
from dimr_fast.layers import GatedMLP, TDParameter

CLASSES = 7


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, as the ablation does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data() -> TileBatches:
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return images, torch.arange(count) % 6, torch.zeros(count, 2, dtype=torch.int64)

    return TileBatches(Tiles(*part(12), *part(6)))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        state=tmp_path,
        batch_size=2,
        minutes=1e-4,
        slice_seconds=1e-3,
        samples=4,
        sampling_steps=2,
    )


def randomised(model: DiMR) -> DiMR:
    """Add noise to every parameter, so that none has no effect by being zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("key", ARMS)
def test_every_arm_predicts_noise_from_image_time_and_class(key: str) -> None:
    arm = ARMS[key]
    torch.manual_seed(0)
    model = randomised(arm.build(CLASSES))
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([0, 6])
    log_snr = torch.tensor([-3.0, 2.0])
    predictions = model(x, log_snr=log_snr, y=y)
    sizes = [16, 32] if key in "cdef" else [32]
    assert [p.shape[1:] for p in predictions] == [(3, size, size) for size in sizes]
    multi_scale_loss(predictions, x).mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    with torch.no_grad():
        for changed in ({"log_snr": log_snr + 1, "y": y}, {"log_snr": log_snr, "y": 6 - y}):
            assert not torch.equal(model(x, **changed)[-1], predictions[-1])
        # Sampling passes one time for all images.
        alone = model(x, log_snr=log_snr[:1], y=y)[-1][0]
    torch.testing.assert_close(alone, predictions[-1][0], rtol=1e-3, atol=1e-4)


def test_arms_have_about_as_many_parameters_as_the_demo() -> None:
    with torch.device("meta"):
        demo = sum(p.numel() for p in DiMR(PRESETS["demo"]).parameters())
    found = {key: ablation_report.describe(key) for key in ARMS}
    assert all(0.9 < arm["parameters"] / demo < 1.1 for arm in found.values()), found
    # The same FLOP as in the published execution of the same model.
    with torch.device("meta"):
        config = ARMS["f"].build(CLASSES).config
    assert found["f"]["flops"] == flops(config)
    assert found["e"]["flops"] == found["d"]["flops"], "the gate costs no products"


@pytest.mark.parametrize("key", ["b", "c"])
def test_adaln_zero_blocks_are_the_identity_before_training(key: str) -> None:
    model = ARMS[key].build(CLASSES)
    blocks = [m for m in model.modules() if isinstance(m, AdaLNZeroBlock)]
    assert len(blocks) == sum(2 * (s.num_blocks // 2) + 1 for s in model.config.stage_configs)
    condition = (torch.randn(2, 128),)
    for block in blocks:
        width = block.block2.w0.in_features
        x = torch.randn(2, 1024, width)
        assert torch.equal(block(x, condition), x)
        torch.nn.init.normal_(block.gates.linear.weight)
        assert not torch.equal(block(x, condition), x)


def test_each_arm_changes_one_thing() -> None:
    with torch.device("meta"):
        models = {key: arm.build(CLASSES) for key, arm in ARMS.items()}
    for key, model in models.items():
        kinds = {type(module) for module in model.modules()}
        assert (GatedMLP in kinds, PlainMLP in kinds) == (key in "ef", key not in "ef")
        assert (TDParameter in kinds) == (key in "def")
        assert (AdaLNZeroBlock in kinds) == (key in "bc")
        assert ARMS[key].multi_scale == (key == "f")
    # The last two are the package's own model.
    assert type(models["f"]) is DiMR
    assert models["f"].config.norm_type == "LN"
    assert models["e"].config == models["f"].config == models["d"].config


@pytest.mark.parametrize("key", ["b", "e"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    key: str, data: TileBatches, settings: Settings, tmp_path: Path
) -> None:
    def steps(run: TrainingRun, count: int) -> None:
        for _ in range(count):
            run.take_step(data, settings, 0.2, torch.float32)

    whole, first, second = (TrainingRun(key, 3, CLASSES) for _ in range(3))
    steps(whole, 3)
    steps(first, 2)
    first.seconds = 5.0
    first.save(tmp_path / "run.safetensors")
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.zero_()
    second.load(tmp_path / "run.safetensors")
    assert (second.step, second.seconds) == (2, 5.0)
    steps(second, 1)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
        assert torch.equal(second.ema.tensors[name], whole.ema.tensors[name]), name


def test_batches_depend_on_seed_and_step_only(data: TileBatches) -> None:
    same = zip(data.batch(1, 7, 4), data.batch(1, 7, 4), strict=True)
    assert all(torch.equal(one, other) for one, other in same)
    assert not torch.equal(data.batch(1, 7, 4)[3], data.batch(1, 8, 4)[3])
    assert not torch.equal(data.batch(1, 7, 4)[3], data.batch(2, 7, 4)[3])


def test_a_step_without_a_finite_gradient_changes_nothing(
    data: TileBatches, settings: Settings
) -> None:
    def infinite_loss(predictions: list[torch.Tensor], noise: torch.Tensor) -> torch.Tensor:
        return predictions[-1].mean() * torch.inf

    run = TrainingRun("f", 0, CLASSES)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.take_step(data, settings, 0.2, torch.float32, infinite_loss)
    assert (run.step, run.skipped) == (1, 1)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_learning_rate_rises_stays_and_falls() -> None:
    factors = [ablation.learning_rate_factor(p) for p in (0, 0.015, 0.03, 0.5, 0.75, 1, 1.1)]
    assert factors == pytest.approx([0, 0.5, 1, 1, 0.5, 0, 0])


def test_every_run_gets_its_cpu_time(data: TileBatches, settings: Settings) -> None:
    runs = [TrainingRun(key, 0, CLASSES) for key in "ae"]
    ablation.train(runs, data, settings, torch.float32)
    for run in runs:
        _, progress = load_checkpoint(ablation.checkpoint_path(settings, run))
        assert progress["seconds"] == run.seconds >= 60 * settings.minutes
        assert progress["step"] == run.step >= 1


def test_a_state_folder_serves_one_recipe_and_one_process(settings: Settings) -> None:
    in_use = pytest.raises(BlockingIOError, match="another process")
    with ablation.locked_state(settings) as first, in_use, ablation.locked_state(settings):
        pass
    with ablation.locked_state(settings) as second:
        assert first == second
    other = Settings(state=settings.state, minutes=2.0)
    with pytest.raises(ValueError, match="state: got"), ablation.locked_state(other):
        pass


@pytest.mark.parametrize("arms", [(), ("c", "g"), ("c", "c")])
def test_unknown_arms_are_refused(arms: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="arms: got"):
        Settings(state=tmp_path, arms=arms).validate()


@pytest.mark.parametrize("name", ["", "plots/ablation"])
def test_a_name_that_is_no_file_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name: got"):
        Settings(state=tmp_path, name=name).validate()


@pytest.mark.parametrize("name", ["minutes", "samples", "batch_size", "slice_seconds"])
def test_an_error_names_the_setting_out_of_range(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=name):
        Settings(state=tmp_path, **{name: 0}).validate()


def result(arm: str, seed: int, frechet: float) -> dict[str, Any]:
    return {
        "arm": arm,
        "seed": seed,
        "steps": 1000,
        "skipped_steps": 0,
        "cpu_seconds": 900.0,
        "images_per_cpu_second": 20.0,
        "held_out_loss": 0.125,
        "frechet": frechet,
        "frechet_training": 52.0,
        "frechet_recipe": "some network",
    }


def test_the_report_contains_the_scores(settings: Settings, tmp_path: Path) -> None:
    with ablation.locked_state(settings):
        pass
    for one in (result("a", 0, 200.0), result("a", 1, 210.0), result("f", 0, 150.0)):
        path = settings.state / f"seed{one['seed']}_{one['arm']}.json"
        path.write_text(json.dumps(one))
    report = json.loads(
        json.dumps(ablation_report.collect(settings.state, machine.commit(*ablation_report.CODE)))
    )
    assert [(run["arm"], run["seed"]) for run in report["runs"]] == [("a", 0), ("f", 0), ("a", 1)]
    rows = [
        line
        for line in ablation_report.ablation_table(report).splitlines()
        if line.startswith("| ")
    ]
    assert [row.split(".")[0] for row in rows[1:]] == ["| a", "| f"]
    assert list(report["arms"]) == ["a", "f"]
    assert "205.0 (200.0–210.0) | 5.85 |" in rows[1]
    assert "150.0 | 3.65 |" in rows[2]
    ablation_report.draw_ablation(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_run_is_scored_on_held_out_tiles(data: TileBatches, settings: Settings) -> None:
    model = TrainingRun("f", 0, CLASSES).averaged()
    # An untrained model predicts almost zero, so the error is the variance of the noise.
    assert ablation.held_out_loss(model, data, torch.float32) == pytest.approx(1, abs=0.5)
    arguments = (model, torch.tensor([0, 1, 2, 3]), data, settings, torch.float32, 0)
    images = ablation.generate(*arguments)
    assert (images.shape, images.dtype) == ((4, 3, 32, 32), torch.uint8)
    assert torch.equal(images, ablation.generate(*arguments))
