"""Sampling in FP8: the layers that are quantised, their accuracy, and what it refuses."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dimr_fast import PRESETS, DiMR, optimize_for_inference, reference
from dimr_fast.checkpoint import TrainedModel
from dimr_fast.config import DiMRConfig
from dimr_fast.data.scaling import PixelScale
from dimr_fast.ops import OPERATORS, why_not_fp8
from dimr_fast.sampling import ImageSampler, SamplerConfig
from tests.support.models import inputs_of, randomised
from tests.support.oracle import DEVICE

HERE = torch.device(DEVICE)
needs_fp8 = pytest.mark.skipif(
    why_not_fp8(HERE) is not None, reason=f"FP8 products: {why_not_fp8(HERE)}"
)
FP8_RELATIVE_ERROR = 2.0**-4
"""Half a step of e4m3, relative to a number just above a power of two: the largest relative error
of a single number."""


def narrow(**overrides: Any) -> DiMRConfig:
    """Return the `tiny` preset with widths that are multiples of 16."""
    branches = tuple(
        replace(branch, dim=width, hidden_dim=2 * width, num_blocks=4)
        for branch, width in zip(PRESETS["tiny"].stage_configs, (48, 32, 16), strict=True)
    )
    return replace(PRESETS["tiny"], stage_configs=branches, **overrides)


@pytest.fixture
def model() -> DiMR:
    return randomised(DiMR(narrow()), 0.05).to(DEVICE)


def inputs(model: DiMR, batch: int, times: int | None = None) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in inputs_of(model, batch, times).items()}


def exact(model: DiMR, batch: dict[str, Tensor]) -> list[Tensor]:
    """Return the predictions in float64."""
    state = {name: value.double() for name, value in model.state_dict().items()}
    x, log_snr = batch["x"].double(), batch["log_snr"].double()
    return reference.dimr(model.config, state, x, log_snr, batch["y"])


@needs_fp8
@pytest.mark.parametrize("norm_type", ["TDRMSN", "LN", "RMSN"])
@pytest.mark.parametrize("times", [1, 3])
def test_predictions_err_by_less_than_a_number_in_e4m3(norm_type: str, times: int) -> None:
    """Also more than in bfloat16: the products are quantised."""
    model = randomised(DiMR(narrow(norm_type=norm_type)), 0.05).to(DEVICE)
    batch = inputs(model, 3, times)
    truth = exact(model, batch)
    bf16 = optimize_for_inference(model)(**batch)
    fp8 = optimize_for_inference(model, quantize="fp8")(**batch)
    for found, closer, expected in zip(fp8, bf16, truth, strict=True):
        error, smaller = (((y - expected).norm() / expected.norm()) for y in (found, closer))
        assert smaller < error < FP8_RELATIVE_ERROR


class Calls(TorchDispatchMode):
    """Records the names of operators, and the sizes of FP8 products."""

    def __enter__(self) -> "Calls":
        self.names: list[str] = []
        self.products: list[tuple[int, ...]] = []
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func.overloadpacket.__name__)
        if self.names[-1] == "_scaled_mm":
            self.products.append(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


@needs_fp8
def test_layers_after_a_norm_or_a_gate_are_quantised_and_no_others(model: DiMR) -> None:
    optimised = optimize_for_inference(model, quantize="fp8")
    with Calls() as calls:
        optimised(**inputs(model, 2))
    expected = []
    for config, branch in zip(model.config.stage_configs, model.stages, strict=True):
        d, hidden = config.dim, config.hidden_dim
        qkv = [(d, 3 * d)] if config.block_type == "TransformerBlock" else []
        expected += len(branch.blocks) * [*qkv, (d, 2 * hidden), (hidden, d)]
    assert calls.products == expected
    stored = {t.dtype for t in optimised.state_dict().values()}
    assert torch.float8_e4m3fn in stored


@needs_fp8
@pytest.mark.parametrize("norm_type", ["TDRMSN", "LN", "RMSN"])
def test_triton_quantises_in_the_kernels_of_norms_and_gate(norm_type: str) -> None:
    reason = OPERATORS["td_rms_norm_fp8"].why_not("triton", torch.empty(1, device=DEVICE))
    if reason is not None:
        pytest.skip(f"triton: {reason}")
    branches = tuple(replace(b, num_blocks=2) for b in narrow().stage_configs)
    config = narrow(norm_type=norm_type)
    model = randomised(DiMR(replace(config, stage_configs=branches)), 0.05).to(DEVICE)
    batch = inputs(model, 2)
    expected = optimize_for_inference(model.set_implementation("reference"), quantize="fp8")(
        **batch
    )
    optimised = optimize_for_inference(model.set_implementation("triton"), quantize="fp8")
    with Calls() as calls:
        outputs = optimised(**batch)
    blocks, attentions = 9, 3
    norm = "td_layer_norm_fp8" if norm_type == "LN" else "td_rms_norm_fp8"
    assert calls.names.count(norm) == blocks + attentions
    assert calls.names.count("gated_gelu_fp8") == blocks
    truth = exact(model, batch)
    for output, wanted, true in zip(outputs, expected, truth, strict=True):
        # Numbers near the middle of two e4m3 values may be rounded to either.
        assert (output - wanted).norm() < FP8_RELATIVE_ERROR * true.norm()


@needs_fp8
def test_batches_of_any_size_share_buffers_and_no_results(model: DiMR) -> None:
    optimised = optimize_for_inference(model, quantize="fp8")
    large = optimised(**inputs(model, 4))
    kept = [output.clone() for output in large]
    assert [len(output) for output in optimised(**inputs(model, 0))] == [0, 0, 0]
    (last,) = optimised(**inputs(model, 4), last_only=True)
    assert torch.equal(last, kept[-1])
    optimised(**inputs(model, 1))
    assert all(torch.equal(a, b) for a, b in zip(large, kept, strict=True))


@needs_fp8
def test_an_implementation_that_does_not_quantise_is_replaced_by_auto(model: DiMR) -> None:
    batch = inputs(model, 2)
    expected = optimize_for_inference(model, quantize="fp8")(**batch)
    found = optimize_for_inference(model.set_implementation("bmm"), quantize="fp8")(**batch)
    for output, wanted in zip(found, expected, strict=True):
        assert (output - wanted).norm() < FP8_RELATIVE_ERROR * wanted.norm()


@needs_fp8
def test_it_samples(model: DiMR) -> None:
    trained = TrainedModel(model, tuple("abcdef"), PixelScale(100.0, 50.0))
    sampler = SamplerConfig(steps=2, precision="fp8")
    draw = ImageSampler(trained, sampler)
    assert draw(torch.arange(3)).shape == (3, 3, 16, 16)
    assert sampler.recipe(trained, HERE)["precision"] == "fp8"


def test_what_it_refuses_is_named(model: DiMR) -> None:
    with pytest.raises(ValueError, match="quantize: got 'fp4', expected None or 'int8' or 'fp8'"):
        optimize_for_inference(model, quantize="fp4")  # type: ignore[arg-type]
    if why_not_fp8(HERE) is None:
        with pytest.raises(ValueError, match=r"dtype: got torch.float16, expected torch.bfloat16"):
            optimize_for_inference(model, torch.float16, quantize="fp8")
        tiny = DiMR.from_preset("tiny").to(DEVICE)
        message = r"quantize: got 'fp8' for stage_configs\[0\].dim = 24, expected a multiple of 16"
        with pytest.raises(ValueError, match=message):
            optimize_for_inference(tiny, quantize="fp8")
    with torch.device("meta"):
        elsewhere = DiMR(narrow())
    with pytest.raises(ValueError, match="quantize: got 'fp8' for a model on meta, but it runs on"):
        optimize_for_inference(elsewhere, quantize="fp8")
