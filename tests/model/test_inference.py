"""The optimised model: same call and predictions as DiMR, and its buffers never show."""

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dimr_fast import PRESETS, DiMR, inference, optimize_for_inference, reference
from dimr_fast.diffusion import (
    ConstantGuidance,
    DiscreteSchedule,
    dpm_solver_singlestep,
    guided,
)
from dimr_fast.ops import OPERATORS
from tests.support.golden import CASES, Golden, relative_error
from tests.support.models import inputs_of, randomised
from tests.support.oracle import DEVICE

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def tiny() -> DiMR:
    return randomised(DiMR.from_preset("tiny"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("mode", "time"), [("mixed_time", "time"), ("uniform_time", "time_uniform")]
)
def test_outputs_equal_the_published_model(case: str, mode: str, time: str) -> None:
    golden = Golden(case)
    model = DiMR(golden.config)
    model.load_state_dict(golden.under("param/"), strict=True)
    optimised = optimize_for_inference(model, torch.float32)
    outputs = optimised(golden["in/x"], None, golden[f"in/{time}"], golden["in/y"])
    assert len(outputs) == len(golden.config.stage_configs)
    for i, output in enumerate(outputs):
        assert relative_error(output, golden[f"{mode}/out/{i}"]) < 1e-5


@functools.cache
def shallow(name: str) -> tuple[DiMR, dict[str, Tensor], list[Tensor]]:
    """Return a shallow small model of a preset, inputs, and the reference's outputs in float64.

    It has the preset's widths, heads, norm and filters, and three blocks per branch.
    """
    config = PRESETS[name]
    lowest = config.stage_configs[0].max_height
    stages = tuple(
        replace(
            stage,
            num_blocks=2,
            max_height=stage.max_height * 4 // lowest,
            max_width=stage.max_width * 4 // lowest,
        )
        for stage in config.stage_configs
    )
    model = randomised(DiMR(replace(config, num_classes=7, stage_configs=stages)), 0.02)
    inputs = inputs_of(model, 2)
    wide = {key: value.double() for key, value in model.state_dict().items()}
    exact = reference.dimr(
        model.config, wide, inputs["x"].double(), inputs["log_snr"].double(), inputs["y"]
    )
    return model, inputs, exact


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("DiMR")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_the_reference_under_autocast(name: str, dtype: torch.dtype) -> None:
    """The root mean square error of an output is at most twice the reference's."""
    model, inputs, exact = shallow(name)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        theirs = reference.dimr(
            model.config, model.state_dict(), inputs["x"], inputs["log_snr"], inputs["y"]
        )
    ours = optimize_for_inference(model, dtype)(**inputs)
    for our, their, truth in zip(ours, theirs, exact, strict=True):
        assert our.dtype == inputs["x"].dtype
        assert (our - truth).norm() <= 2 * (their - truth).norm()


@pytest.mark.parametrize("norm_type", ["TDRMSN", "LN", "RMSN"])
def test_batches_in_any_order_share_buffers_and_no_results(norm_type: str) -> None:
    model = randomised(DiMR.from_preset("tiny", norm_type=norm_type))
    optimised = optimize_for_inference(model, torch.float32)
    kept = []
    for batch, times in [(3, 3), (1, 1), (5, 1), (0, 1), (2, 2), (0, 0)]:
        inputs = inputs_of(model, batch, times)
        inputs["y"] = inputs["y"].int()
        with torch.no_grad():
            expected = model(**inputs)
        kept.append((optimised(**inputs), expected))
    for outputs, expected in kept:
        for output, wanted in zip(outputs, expected, strict=True):
            assert output.shape == wanted.shape
            torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)


def test_blocks_write_to_buffers_that_stay(tiny: DiMR) -> None:
    optimised = optimize_for_inference(tiny)
    optimised(**inputs_of(tiny, 3))
    places = [buffers.pairs.data_ptr() for buffers in optimised.shared_buffers]
    outputs = optimised(**inputs_of(tiny, 2))
    assert [buffers.pairs.data_ptr() for buffers in optimised.shared_buffers] == places
    owned = {buffers.pairs.untyped_storage().data_ptr() for buffers in optimised.shared_buffers}
    assert not owned & {output.untyped_storage().data_ptr() for output in outputs}


@pytest.mark.usefixtures("poisoned_memory")
def test_nothing_unwritten_is_read(tiny: DiMR) -> None:
    for output in optimize_for_inference(tiny)(**inputs_of(tiny, 2)):
        assert output.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_last_prediction_alone_is_the_same(tiny: DiMR, dtype: torch.dtype) -> None:
    optimised = optimize_for_inference(tiny, dtype)
    inputs = inputs_of(tiny, 2)
    every, (last,) = optimised(**inputs), optimised(**inputs, last_only=True)
    assert torch.equal(last, every[-1])


@pytest.mark.parametrize("change", [{"dropout_prob": 0.5}, {"num_blocks": 1}, {"num_blocks": 5}])
def test_dropout_is_off_and_any_depth_works(change: dict[str, Any]) -> None:
    stages = tuple(replace(stage, **change) for stage in PRESETS["tiny"].stage_configs)
    model = randomised(DiMR.from_preset("tiny", stage_configs=stages)).train()
    optimised = optimize_for_inference(model, torch.float32)
    inputs = inputs_of(model, 2)
    with torch.no_grad():
        expected = model.eval()(**inputs)
    for output, wanted in zip(optimised(**inputs), expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_type", ["TDRMSN", "RMSN", "LN"])
def test_triton_adds_the_mlp_in_place(norm_type: str) -> None:
    """Test the path of a GPU: the norm writes the sum to its slot, the product is added there."""
    model = randomised(DiMR.from_preset("tiny", norm_type=norm_type)).to(DEVICE)
    reason = OPERATORS["td_rms_norm"].why_not("triton", torch.empty(1, device=DEVICE))
    if reason is not None:
        pytest.skip(f"triton: {reason}")
    inputs = {name: value.to(DEVICE) for name, value in inputs_of(model, 2).items()}
    with torch.no_grad():
        expected = model.set_implementation("reference")(**inputs)
    optimised = optimize_for_inference(model.set_implementation("triton"), torch.float32)
    with Operators() as called:
        outputs = optimised(**inputs)
    blocks = sum(len(stage.blocks) for stage in model.stages)
    in_slots = blocks - len(model.stages)  # the last block of a branch writes to a new tensor
    assert called.count("td_rms_norm_into") == (0 if norm_type == "LN" else in_slots)
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)


class Operators(TorchDispatchMode):
    """Records the names of our operators in the order of their calls."""

    def __enter__(self) -> list[str]:
        self.called: list[str] = []
        super().__enter__()
        return self.called

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "dimr_fast":
            self.called.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_original_goes_on_training_alone(tiny: DiMR) -> None:
    before = copy.deepcopy(tiny.state_dict())
    optimised = optimize_for_inference(tiny)
    assert not any(parameter.requires_grad for parameter in optimised.parameters())
    inputs = inputs_of(tiny, 2)
    first = optimised(**inputs)
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    optimizer = torch.optim.SGD(tiny.parameters(), lr=0.1)
    sum(output.square().mean() for output in tiny(**inputs)).backward()
    optimizer.step()
    assert not torch.equal(
        tiny.state_dict()["stages.0.blocks.0.block2.w0.weight"],
        before["stages.0.blocks.0.block2.w0.weight"],
    )
    for output, again in zip(first, optimised(**inputs), strict=True):
        assert torch.equal(output, again)


def test_callers_modes_do_not_matter(tiny: DiMR) -> None:
    optimised = optimize_for_inference(tiny, torch.float32)
    inputs = inputs_of(tiny, 2)
    plain = optimised(**inputs)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        built_there = optimize_for_inference(tiny, torch.float32)
        for model in (optimised, built_there):
            for output, wanted in zip(model(**inputs), plain, strict=True):
                assert torch.equal(output, wanted)
    inputs["x"].requires_grad_()
    for output, wanted in zip(built_there(**inputs), plain, strict=True):
        assert torch.equal(output, wanted)
        assert not output.requires_grad


@pytest.mark.versions
def test_torch_compile_leaves_an_optimised_model_as_it_is(tiny: DiMR) -> None:
    optimised = optimize_for_inference(tiny)
    inputs = inputs_of(tiny, 2)

    def step(x: Tensor) -> Tensor:
        return 2 * optimised(x, log_snr=inputs["log_snr"], y=inputs["y"])[-1] + 1

    expected = optimised(**inputs)
    for output, wanted in zip(torch.compile(optimised)(**inputs), expected, strict=True):
        assert torch.equal(output, wanted)
    compiled = torch.compile(step)(inputs["x"])
    torch.testing.assert_close(compiled, 2 * expected[-1] + 1)
    torch.compiler.reset()  # otherwise a graph with a break would come from the cache
    with pytest.raises(RuntimeError, match="an optimised model is compiled code already"):
        torch.compile(step, fullgraph=True)(inputs["x"])


def test_predictions_have_the_dtype_of_the_image(tiny: DiMR) -> None:
    optimised = optimize_for_inference(tiny)
    inputs = inputs_of(tiny, 2)
    for dtype in (*DTYPES, torch.float64):
        outputs = optimised(**{**inputs, "x": inputs["x"].to(dtype)})
        assert {output.dtype for output in outputs} == {dtype}


def test_named_implementations_are_kept(tiny: DiMR) -> None:
    optimised = optimize_for_inference(tiny.set_implementation("reference"), torch.float32)
    kept = {m.implementation for m in optimised.modules() if hasattr(m, "implementation")}
    assert kept == {"reference"}
    inputs = inputs_of(tiny, 2)
    with torch.no_grad():
        expected = tiny(**inputs)
    for output, wanted in zip(optimised(**inputs), expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)


def test_wider_heads_compute_the_same(tiny: DiMR) -> None:
    attention = tiny.stages[0].blocks[0].block1
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    td = [torch.ones(1, 24) for module in tiny.modules() if hasattr(module, "nodecay_bias")]
    with torch.no_grad():
        wide = inference.PaddedAttention(attention, 16, torch.float32)
        assert wide.query_key_value.weight.shape == (3 * 2 * 16, 24)
        torch.testing.assert_close(wide(x, td), attention(x, td))


def test_outside_the_interval_there_is_no_null_half(tiny: DiMR) -> None:
    optimised = optimize_for_inference(tiny, torch.float32)
    batches: list[int] = []
    optimised.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))

    def predict(x: Tensor, condition: Tensor, y: Tensor) -> Tensor:
        return optimised(x, log_snr=condition, y=y, last_only=True)[0]

    x, y = inputs_of(tiny, 3)["x"], torch.arange(3)
    always = guided(predict, y, tiny.config.null_class, ConstantGuidance(0.4))
    never = guided(predict, y, tiny.config.null_class, ConstantGuidance(0.0))
    inside = guided(
        predict, y, tiny.config.null_class, ConstantGuidance(0.4), interval=(0.5, 0.875)
    )
    times = [0.25, 0.5, 0.75, 0.875, 1.0]
    found = [inside(x, torch.tensor(t)) for t in times]
    assert batches == [3, 6, 6, 6, 3]
    for t, noise in zip(times, found, strict=True):
        expected = (always if 0.5 <= t <= 0.875 else never)(x, torch.tensor(t))
        assert torch.equal(noise, expected)
    batches.clear()
    dpm_solver_singlestep(inside, x, DiscreteSchedule(), 4)
    assert batches == [3, 6, 6, 3]
    with pytest.raises(ValueError, match=r"t: got shape \(3,\) on cpu, expected one time"):
        inside(x, torch.full((3,), 0.5))
    with pytest.raises(ValueError, match=r"interval: got \(0\.5, 0\.25\)"):
        guided(predict, y, 0, ConstantGuidance(0.4), interval=(0.5, 0.25))


def test_a_guided_sample_stays_close_to_float32(tiny: DiMR) -> None:
    schedule = DiscreteSchedule()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = torch.arange(2)

    def sampled(model: Callable[..., list[Tensor]]) -> Tensor:
        predict = lambda x, condition, y: model(x, log_snr=condition, y=y)[-1]  # noqa: E731
        noise_fn = guided(predict, y, tiny.config.null_class, ConstantGuidance(0.4))
        return dpm_solver_singlestep(noise_fn, x, schedule, 25, clip=(-2.0, 2.0))

    exact = sampled(tiny)
    assert exact.std() > 0.5
    for dtype, distance in DISTANCES.items():
        found = sampled(optimize_for_inference(tiny, dtype))
        assert (found - exact).square().mean().sqrt() < distance * exact.std()


DISTANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""The largest root mean square error, relative to the sample's standard deviation."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 8, 8)}, r"x: got shape \(2, 3, 8, 8\), expected \[B, 3, 16, 16\]"),
        ({"x": torch.zeros(2, 3, 16, 16).int()}, r"x: got dtype torch\.int32"),
        ({"log_snr": None}, "log_snr: got None"),
        ({"log_snr": torch.zeros(3)}, r"log_snr: got shape \(3,\)"),
        ({"y": torch.zeros(2)}, r"y: got dtype torch\.float32"),
        ({"y": torch.zeros(1).long()}, r"y: got shape \(1,\)"),
        ({"y": torch.zeros(2, device="meta").long()}, "y: got device meta"),
    ],
)
def test_bad_inputs_are_named(tiny: DiMR, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimize_for_inference(tiny)(**{**inputs_of(tiny, 2), **change})


def test_bad_settings_are_named(tiny: DiMR) -> None:
    with pytest.raises(ValueError, match=r"dtype: got torch\.float64"):
        optimize_for_inference(tiny, torch.float64)
    with pytest.raises(ValueError, match="cuda_graphs: got 'yes'"):
        optimize_for_inference(tiny, cuda_graphs="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cuda_graphs: got True for a model on cpu"):
        optimize_for_inference(tiny, cuda_graphs=True)


def test_it_says_that_it_cannot_be_moved(tiny: DiMR) -> None:
    optimised = optimize_for_inference(tiny)
    for move in (optimised.half, lambda: optimised.to("meta"), optimised.double):
        with pytest.raises(RuntimeError, match="cannot be moved or cast"):
            move()
    assert optimised(**inputs_of(tiny, 1))[-1].isfinite().all()
