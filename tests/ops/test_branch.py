"""A branch in one call of the CPU library: what the optimised model computes on a CPU."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimr_fast import PRESETS, DiMR, ops, optimize_for_inference, reference
from tests.support.cpu_library import needs_cpu, on_threads
from tests.support.models import inputs_of, randomised

pytestmark = needs_cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = ["TDRMSN", "LN", "RMSN"]


def model_of(norm_type: str = "TDRMSN", **lowest: Any) -> DiMR:
    """Return a small model; `lowest` replaces fields of its lowest branch."""
    torch.manual_seed(0)
    first, *others = PRESETS["tiny"].stage_configs
    stages = (replace(first, **lowest), *others)
    return randomised(DiMR.from_preset("tiny", norm_type=norm_type, stage_configs=stages), 0.05)


def exact(model: DiMR, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return the reference's predictions in float64."""
    wide = {key: value.double() for key, value in model.state_dict().items()}
    x, times = inputs["x"].double(), inputs["log_snr"].double()
    return reference.dimr(model.config, wide, x, times, inputs["y"])


def error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative error of the predictions, in the root mean square."""
    pairs = zip(actual, expected, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", NORMS)
def test_predictions(instruction_set: str, norm_type: str, dtype: torch.dtype) -> None:
    model = model_of(norm_type)
    optimised = optimize_for_inference(model, dtype)
    assert optimised.uses_cpu_library
    # The memory of the features is allocated for 3 images; for 2 a part of it is used.
    for batch in (3, 2):
        inputs = inputs_of(model, batch)
        found = error(optimised(**inputs), exact(model, inputs))
        assert found < (1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
    assert [len(p) for p in optimised(**inputs_of(model, 0))] == [0, 0, 0]


@pytest.mark.parametrize(
    "lowest",
    [
        {"num_blocks": 1},
        {"num_blocks": 5},
        {"hidden_dim": 7},
        # More elements than one pass over the summed axis takes, and no multiple of any vector.
        {"hidden_dim": 4219},
        {"dim": 15, "num_attention_heads": 3},
        {"dim": 130, "num_attention_heads": 2},
        {"block_type": "ConvNeXtBlock", "kernel_size": 3, "dim": 27},
        {"final_kernel_size": 1},
        {"final_kernel_size": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_shapes(instruction_set: str, lowest: dict[str, Any], quantize: Any) -> None:
    model = model_of(**lowest)
    inputs = inputs_of(model, 2)
    truth = exact(model, inputs)
    for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 0.01)):
        optimised = optimize_for_inference(model, dtype, quantize=quantize)
        assert optimised.uses_cpu_library
        found = error(optimised(**inputs), truth)
        assert found < (0.03 if quantize else most)


def test_every_instruction_set_computes_the_same_integers(instruction_set: str) -> None:
    """The result equals products of rounded numbers, not products of the numbers themselves."""
    model = model_of(num_blocks=1, block_type="ConvNeXtBlock")
    model = DiMR(replace(model.config, stage_configs=model.config.stage_configs[:1]))
    randomised(model)
    inputs = inputs_of(model, 2)
    (found,) = optimize_for_inference(model, torch.float32, quantize="int8")(**inputs)
    (expected,) = _quantised(model, inputs)
    # Not exactly: a number half-way between two integers may be rounded to the other one.
    assert error([found], [expected]) < 0.05 * error([expected], exact(model, inputs))


def test_the_largest_sums_of_integers(instruction_set: str) -> None:
    """G/2R multiplies 66,816 numbers by the cascade's weights."""
    width = (1 << 17) - 1
    model = model_of(num_blocks=1, hidden_dim=width)
    mlp = model.stages[0].blocks[0].block2
    for layer in (mlp.w0, mlp.w1):
        nn.init.zeros_(layer.weight)
        nn.init.ones_(layer.bias)
    nn.init.constant_(mlp.w2.weight, 4 / width)
    inputs = inputs_of(model, 2)
    for sign in (1, -1):
        mlp.w2.weight.data *= sign
        optimised = optimize_for_inference(model, torch.float32, quantize="int8")
        assert error(optimised(**inputs), exact(model, inputs)) < 0.03


def _quantised(model: DiMR, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Compute a model of one ConvNeXt block in float64 with rounded factors of its products."""
    branch = model.stages[0]
    wide = {key: value.double() for key, value in branch.state_dict().items()}

    def rounded(rows: Tensor) -> Tensor:
        scale = rows.abs().amax(-1, keepdim=True) / 127
        return (rows / scale).round() * scale

    def linear(x: Tensor, name: str) -> Tensor:
        weight, bias = (wide[f"blocks.0.block2.{name}.{kind}"] for kind in ("weight", "bias"))
        return F.linear(rounded(x), rounded(weight), bias)

    def parameter(name: str) -> Tensor:
        kinds = ("param0", "param1", "nodecay_weight", "nodecay_bias")
        time = inputs["log_snr"].double() / 4
        return reference.td_parameter(time, *(wide[f"{name}.{kind}"] for kind in kinds))

    side = branch.input_layer[1].stride[0]
    weight, bias = wide["input_layer.1.weight"], wide["input_layer.1.bias"]
    image = F.conv2d(inputs["x"].double(), weight, bias, stride=side)
    x = image.flatten(2).mT + wide["input_layer.3.position_embeddings.weight"]
    size = image.shape[2:]
    x = x.unflatten(1, size)
    filters = wide["blocks.0.block1.1.weight"], wide["blocks.0.block1.1.bias"]
    x = (x + reference.depthwise_conv2d(x, *filters)).flatten(1, 2)
    normed = reference.td_rms_norm(x, parameter("blocks.0.block2.norm.scale"))
    x = x + linear(F.gelu(linear(normed, "w0")) * linear(normed, "w1"), "w2")
    normed = reference.td_layer_norm(
        x, parameter("output_layer.0.weight"), parameter("output_layer.0.bias")
    )
    head = wide["output_layer.2.weight"], wide["output_layer.2.bias"]
    return [F.conv2d(normed.mT.unflatten(2, size), *head, padding=head[0].shape[-1] // 2)]


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_results_do_not_depend_on_the_number_of_threads(quantize: Any) -> None:
    model = DiMR.from_preset("demo")
    optimised = optimize_for_inference(model, quantize=quantize)
    inputs = inputs_of(model, 3)
    one, *others = (on_threads(n, lambda: tuple(optimised(**inputs))) for n in (1, 2, 3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_images_do_not_affect_one_another(quantize: Any) -> None:
    model = model_of()
    optimised = optimize_for_inference(model, quantize=quantize)
    inputs = inputs_of(model, 3)
    together = optimised(**inputs)
    inputs["x"][0] = float("nan")
    for whole, other in zip(together, optimised(**inputs), strict=True):
        assert other[0].isnan().all()
        assert torch.equal(whole[1:], other[1:])


def test_one_time_for_all_images() -> None:
    model = model_of()
    optimised = optimize_for_inference(model, torch.float32)
    inputs = inputs_of(model, 3)
    inputs["log_snr"] = torch.full((3,), 0.5)
    expected = optimised(**inputs)
    inputs["log_snr"] = torch.tensor([0.5])
    assert all(torch.equal(a, b) for a, b in zip(optimised(**inputs), expected, strict=True))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_images_of_any_dtype_and_layout(dtype: torch.dtype) -> None:
    model = model_of()
    optimised = optimize_for_inference(model, torch.float32)
    inputs = inputs_of(model, 2)
    inputs["x"] = inputs["x"].to(dtype)
    expected = optimised(**inputs | {"x": inputs["x"].float()})
    for layout in (torch.contiguous_format, torch.channels_last):
        found = optimised(**inputs | {"x": inputs["x"].to(memory_format=layout)})
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == dtype
            assert torch.equal(a, b.to(dtype))


def test_a_named_implementation_runs_operator_by_operator() -> None:
    model = model_of()
    inputs = inputs_of(model, 2)
    model.set_implementation("reference")
    optimised = optimize_for_inference(model, torch.float32)
    assert not optimised.uses_cpu_library
    assert error(optimised(**inputs), exact(model, inputs)) < 1e-6
    with pytest.raises(ValueError, match="quantize: got 'int8'"):
        optimize_for_inference(model, quantize="int8")


def valid_arguments() -> dict[str, Any]:
    """Return arguments of `ops.branch` for a ConvNeXt branch of one block and width 8."""
    pack = ops.pack_linear
    fp32 = ops.Factors.FLOAT32
    return {
        "image": torch.randn(1, 3, 4, 4),
        "first": torch.empty(1, 4, 8),
        "pairs": torch.empty(0, 1, 4, 2, 8),
        "last": torch.empty(1, 4, 8),
        "lower": [],
        "token": None,
        "values": [torch.ones(1, 8) for _ in range(3)],
        "parameters": [
            pack(torch.randn(8, 12), torch.zeros(8), fp32),
            torch.zeros(4, 8),
            torch.zeros(8, 1, 3, 3),
            torch.zeros(8),
            pack(torch.randn(32, 8), torch.zeros(32), fp32, gated=True),
            pack(torch.randn(8, 16), torch.zeros(8), fp32),
            pack(torch.randn(27, 8), None, fp32),
            torch.zeros(3),
        ],
        "heads": 0,
        "layer_norm": False,
        "predicts": True,
    }


def _parameter(index: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(arguments: dict[str, Any]) -> None:
        arguments["parameters"][index] = value

    return change


def _argument(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arguments: arguments.update({name: value})


def _cut(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda arguments: arguments[name].pop()


def _doubled(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda arguments: arguments[name].extend(arguments[name])


BAD: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (_cut("parameters"), "parameters: "),
    (_doubled("parameters"), "parameters: "),
    (_cut("values"), "values: "),
    (_doubled("values"), "values: "),
    (_argument("image", torch.randn(1, 3, 6, 4)), "first: "),
    (_argument("image", torch.randn(1, 3, 5, 4)), "image: "),
    (_argument("image", torch.randn(1, 5, 4, 4)), "image: "),
    (_argument("image", torch.randn(2, 3, 4, 4)), "first: "),
    (_argument("image", torch.randn(3, 4, 4)), "image: "),
    (_argument("image", torch.randn(1, 3, 4, 4).double()), "image: "),
    (_argument("first", torch.empty(1, 4, 7)), "pairs: "),
    (_argument("first", torch.empty(1, 4, 8, dtype=torch.bfloat16)), "one dtype"),
    (_argument("pairs", torch.empty(1, 1, 4, 1, 8)), "pairs: "),
    (_argument("pairs", torch.empty(1, 1, 2, 4, 8).transpose(2, 3)), "pairs: "),
    (_argument("token", torch.zeros(1, 8)), "first: "),
    (_argument("lower", [torch.zeros(1, 1, 8)]), "lower: "),
    (_argument("heads", -1), "heads: "),
    (_argument("layer_norm", True), "values: "),
    (_parameter(0, torch.randn(8, 12)), "pack_linear"),
    (_parameter(0, torch.zeros(64, dtype=torch.uint8)), "weight: "),
    (_parameter(0, torch.full((64,), 255, dtype=torch.uint8)), "factors: "),
    (_parameter(1, torch.zeros(4, 9)), "position"),
    (_parameter(2, torch.zeros(8, 1, 2, 2)), "filters"),
    (_parameter(3, torch.zeros(7)), "filters"),
    (_parameter(4, ops.pack_linear(torch.randn(32, 9), None, ops.Factors.INT8)), "inputs"),
    (_parameter(4, ops.pack_linear(torch.randn(32, 8), None, ops.Factors.INT8)), "outputs"),
    (_parameter(5, ops.pack_linear(torch.randn(8, 15), None, ops.Factors.INT8)), "inputs"),
    (_parameter(6, ops.pack_linear(torch.randn(26, 8), None, ops.Factors.INT8)), "head"),
    (_parameter(7, torch.zeros(3, dtype=torch.bfloat16)), "head"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_arguments_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    arguments = valid_arguments()
    assert ops.branch(**arguments).shape == (1, 3, 2, 2)
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        ops.branch(**arguments)


def test_a_transformer_branch_needs_a_divisor_of_the_width() -> None:
    arguments = valid_arguments() | {"heads": 3}
    with pytest.raises(RuntimeError, match="heads: expected a divisor of 8"):
        ops.branch(**arguments)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.zeros(4), None, "weight: "),
        (torch.zeros(4, 3).double(), None, "weight: "),
        (torch.zeros(4, 0), None, "weight: "),
        (torch.zeros(4, 3), torch.zeros(3), "bias: "),
        (torch.zeros(1, 1 << 17), None, "131072"),
    ],
)
def test_weights_that_cannot_be_packed_are_refused(
    weight: Tensor, bias: Tensor | None, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.pack_linear(weight, bias, ops.Factors.INT8)


def test_an_odd_number_of_gated_columns_is_refused() -> None:
    with pytest.raises(RuntimeError, match="even N"):
        ops.pack_linear(torch.zeros(3, 4), None, ops.Factors.FLOAT32, gated=True)
