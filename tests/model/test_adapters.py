"""Libraries that change layers: adapters of peft, weight norm, quantised weights of torchao."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dimr_fast import DiMR, optimize_for_inference
from tests.support.models import inputs, randomised

KINDS = (nn.Linear, nn.Conv2d, nn.Embedding)


def small(implementation: str = "auto") -> DiMR:
    torch.manual_seed(0)
    return randomised(DiMR.from_preset("tiny")).set_implementation(implementation)


LAYERS = {name: m for name, m in small().named_modules() if isinstance(m, KINDS)}
ONE_OF_EACH = list({re.sub(r"(blocks|skip_denses)[.]\d+", "", n): n for n in LAYERS}.values())
"""One layer of each kind in each branch."""


def is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups > 1


MERGEABLE = [name for name in ONE_OF_EACH if not is_depthwise(LAYERS[name])]
DEPTHWISE = [name for name in ONE_OF_EACH if is_depthwise(LAYERS[name])]


def predictions(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return model(**inputs())


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def differ(a: list[Tensor], b: list[Tensor]) -> bool:
    return any(not torch.allclose(x, y, atol=1e-3) for x, y in zip(a, b, strict=True))


# Imported by each test: the import takes longer than a test.
@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft", reason="needs the peft package")


def with_lora(peft: Any, model: DiMR, *names: str) -> Any:
    """Return the model with an adapter that changes its results in each of these layers."""
    # peft needs a rank that is a multiple of the groups of a convolution.
    rank = max(getattr(LAYERS[name], "groups", 1) for name in names)
    settings = peft.LoraConfig(r=max(rank, 2), target_modules=list(names), init_lora_weights=False)
    return peft.get_peft_model(model, settings)


def adapter_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    sum(p.square().mean() for p in model(**inputs())).backward()
    return {name: p.grad for name, p in model.named_parameters() if "lora" in name}


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("name", MERGEABLE)
def test_lora_gets_gradients_and_can_be_merged(peft: Any, name: str, implementation: str) -> None:
    model = with_lora(peft, small(implementation), name)
    gradients = adapter_gradients(model)
    assert len(gradients) == 2
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    with_adapter = predictions(model)
    assert differ(with_adapter, predictions(small()))
    with model.disable_adapter():
        assert_close(predictions(model), predictions(small()))
    merged = model.merge_and_unload()
    assert type(merged) is DiMR
    assert_close(predictions(merged), with_adapter)
    optimised = optimize_for_inference(merged, dtype=torch.float32)
    assert_close(predictions(optimised), with_adapter)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEPTHWISE)
def test_lora_on_a_depthwise_convolution_gets_gradients(peft: Any, name: str) -> None:
    """peft does not merge these."""
    model = with_lora(peft, small(), name)
    assert all(g is not None and g.any() for g in adapter_gradients(model).values())
    assert differ(predictions(model), predictions(small()))


@pytest.mark.slow
def test_lora_on_all_linear_layers_at_once(peft: Any) -> None:
    names = [name for name, layer in LAYERS.items() if isinstance(layer, nn.Linear)]
    model = with_lora(peft, small(), *names)
    gradients = adapter_gradients(model)
    assert len(gradients) == 2 * len(names)
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    with_adapter = predictions(model)
    assert_close(predictions(model.merge_and_unload()), with_adapter)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_weight_norm_changes_no_result_and_gets_gradients(implementation: str) -> None:
    model = small(implementation)
    before = predictions(model)
    for name in ONE_OF_EACH:
        parametrizations.weight_norm(model.get_submodule(name))
    assert_close(predictions(model), before)
    sum(p.square().mean() for p in model(**inputs())).backward()
    norms = [p for name, p in model.named_parameters() if name.endswith("original0")]
    assert len(norms) == len(ONE_OF_EACH)
    assert all(norm.grad is not None and norm.grad.any() for norm in norms)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_weights_quantised_by_torchao(implementation: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="needs the torchao package")
    model = small(implementation)
    before = predictions(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    rounded = small(implementation)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, layer in linear.items():
        rounded.get_submodule(name).weight.data = layer.weight.dequantize()
    found = predictions(model)
    assert_close(found, predictions(rounded))
    assert differ(found, before)
    for x, y in zip(found, before, strict=True):
        assert (x - y).norm() < 0.05 * y.norm()
    with pytest.raises(ValueError, match=r"\.weight, expected Parameter"):
        optimize_for_inference(copy.deepcopy(model))
