"""Compare the benchmarks' published execution with the published model's own numbers."""

from typing import Any

import pytest
import torch
from torch.utils import checkpoint

from benchmarks.model import published as baseline
from benchmarks.model.published import PublishedDiMR
from dimr_fast import DiMR
from dimr_fast.diffusion import ConstantGuidance, multi_scale_loss
from dimr_fast.diffusion.guidance import guided
from tests.support.golden import CASES, Golden, relative_error

TOLERANCE = 1e-5


def golden_model(case: str) -> tuple[Golden, DiMR]:
    golden = Golden(case)
    model = DiMR(golden.config)
    model.load_state_dict(golden.under("param/"), strict=True)
    return golden, model


def arguments(golden: Golden, time: str = "time") -> dict[str, Any]:
    return {"x": golden["in/x"], "log_snr": golden[f"in/{time}"], "y": golden["in/y"]}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("mode", "time"), [("mixed_time", "time"), ("uniform_time", "time_uniform")]
)
def test_outputs_equal_the_published_model(case: str, mode: str, time: str) -> None:
    golden, model = golden_model(case)
    outputs = PublishedDiMR.of(model)(**arguments(golden, time))
    assert len(outputs) == len(golden.config.stage_configs)
    for i, output in enumerate(outputs):
        assert relative_error(output, golden[f"{mode}/out/{i}"]) < TOLERANCE


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_equal_the_published_model(case: str, checkpointing: bool) -> None:
    golden, model = golden_model(case)
    outputs = PublishedDiMR.of(model, checkpointing)(**arguments(golden))
    loss = multi_scale_loss(outputs, golden["in/noise"], golden.loss_coeffs)
    assert relative_error(loss, golden["loss/per_image"]) < TOLERANCE
    loss.mean().backward()
    # Both share parameters, and so gradients.
    found = {name: p.grad for name, p in model.named_parameters()}
    expected = golden.under("grad/")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < TOLERANCE, name


def test_parameters_are_shared_under_their_published_names() -> None:
    model = DiMR.from_preset("tiny")
    shared = dict(PublishedDiMR.of(model).named_parameters())
    assert shared.keys() == dict(model.named_parameters()).keys()
    assert all(shared[name] is parameter for name, parameter in model.named_parameters())


def test_each_block_is_checkpointed_with_and_without_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    golden, model = golden_model("three_branch_tdrms")
    calls: list[str] = []
    original = checkpoint.checkpoint

    def counting_checkpoint(*given: Any, **options: Any) -> Any:
        calls.append("checkpoint")
        return original(*given, **options)

    monkeypatch.setattr(checkpoint, "checkpoint", counting_checkpoint)
    published = PublishedDiMR.of(model)
    blocks = 0
    for branch in published.stages:
        for block in branch.blocks:
            blocks += 1
            block.block1.register_forward_pre_hook(lambda *_: calls.append("run"))
    with torch.no_grad():
        published(**arguments(golden))
    assert calls.count("checkpoint") == calls.count("run") == blocks
    sum(o.square().mean() for o in published(**arguments(golden))).backward()
    # The backward pass recomputes each block.
    assert (calls.count("checkpoint"), calls.count("run")) == (2 * blocks, 3 * blocks)


def test_autocast_returns_bf16_close_to_fp32() -> None:
    golden, model = golden_model("three_branch_tdrms")
    published = PublishedDiMR.of(model)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = published(**arguments(golden))
    for i, output in enumerate(outputs):
        assert output.dtype == torch.bfloat16
        assert relative_error(output.float(), golden[f"mixed_time/out/{i}"]) < 0.05
    sum(o.float().square().mean() for o in outputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.versions
@pytest.mark.parametrize("time", ["time", "time_uniform"])
def test_compiles_as_one_graph_without_gradients(time: str) -> None:
    golden, model = golden_model("two_branch_tdrms")
    compiled = torch.compile(PublishedDiMR.of(model), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        outputs = compiled(**arguments(golden, time))
    mode = "mixed_time" if time == "time" else "uniform_time"
    for i, output in enumerate(outputs):
        assert relative_error(output, golden[f"{mode}/out/{i}"]) < TOLERANCE


@pytest.mark.versions
def test_compiles_in_training() -> None:
    golden, model = golden_model("two_branch_tdrms")
    compiled = torch.compile(PublishedDiMR.of(model), backend="aot_eager")
    loss = multi_scale_loss(
        compiled(**arguments(golden)), golden["in/noise"], golden.loss_coeffs
    ).mean()
    loss.backward()
    expected = golden.under("grad/")
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, expected[name]) < TOLERANCE, name


def test_guidance_by_two_passes_equals_ours() -> None:
    golden, model = golden_model("two_branch_tdrms")
    null = model.config.null_class
    x, y, t = golden["in/x"], golden["in/y"], torch.tensor(0.3)
    ours = guided(lambda x, c, y: model(x, log_snr=c, y=y)[-1], y, null, ConstantGuidance(0.4))
    with torch.no_grad():
        expected = ours(x, t)
        condition = (8 * t - 4).expand(len(x))
        actual = baseline.guided(PublishedDiMR.of(model), x, condition, y, null)
    assert relative_error(actual, expected) < TOLERANCE
