"""Layers that were replaced or have hooks are called as modules, as in the published model.

Adapters and quantising libraries replace layers; tools that inspect a model register hooks.
"""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dimr_fast import DiMR, optimize_for_inference
from tests.support.models import inputs_of, randomised


def small() -> DiMR:
    torch.manual_seed(0)
    return randomised(DiMR.from_preset("tiny"))


KINDS = (nn.Linear, nn.Conv2d, nn.Embedding)
LAYERS = {name: m for name, m in small().named_modules() if isinstance(m, KINDS)}
ONE_OF_EACH = list({re.sub(r"(blocks|skip_denses)[.]\d+", "", n): n for n in LAYERS}.values())
"""One layer of each kind in each branch."""
LINEAR = [name for name in ONE_OF_EACH if isinstance(LAYERS[name], nn.Linear)]
OTHERS = [name for name in ONE_OF_EACH if name not in LINEAR]
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["auto", "reference"])


def predictions(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return model(**inputs_of(small(), 2))


def replace(model: DiMR, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


class LowRank(nn.Module):
    """An adapter: a layer plus a product of two narrow matrices."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        """The weight of the layer alone, as adapters of the peft library have it."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> nn.Linear:
        layer = copy.deepcopy(self.base)
        with torch.no_grad():
            layer.weight += self.up.weight @ self.down.weight
        return layer


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", LINEAR)
def test_an_adapter_equals_the_layer_that_it_is_merged_into(name: str, implementation: str) -> None:
    model = small().set_implementation(implementation)
    adapter = LowRank(model.get_submodule(name))
    merged = copy.deepcopy(model)
    replace(merged, name, adapter.merged())
    without = predictions(model)
    replace(model, name, adapter)
    found, expected = predictions(model), predictions(merged)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(found, without, strict=True))


class Twice(nn.Module):
    """A layer in place of another one: two times its result."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", OTHERS)
def test_a_replaced_convolution_or_embedding_is_called(name: str, implementation: str) -> None:
    model = small().set_implementation(implementation)
    doubled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in doubled.get_submodule(name).parameters():
            parameter *= 2
    replace(model, name, Twice(model.get_submodule(name)))
    for actual, wanted in zip(predictions(model), predictions(doubled), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_model_with_other_layers_is_not_optimised(name: str) -> None:
    """Its own layers' weights alone would be another model."""
    model = small()
    layer = model.get_submodule(name)
    parametrised = copy.deepcopy(model)
    parametrize.register_parametrization(parametrised.get_submodule(name), "weight", Doubled())
    replace(model, name, Twice(layer))
    expected = next(kind.__name__ for kind in KINDS if isinstance(layer, kind))
    for changed, found in ((model, "Twice"), (parametrised, f"Parametrized{expected}")):
        with pytest.raises(ValueError, match=f"model: got {found} as {name}, expected {expected}"):
            optimize_for_inference(changed)


@pytest.mark.parametrize("name", LINEAR)
def test_an_adapter_gets_gradients(name: str) -> None:
    model = small()
    adapter = LowRank(model.get_submodule(name))
    replace(model, name, adapter)
    sum(p.square().mean() for p in model(**inputs_of(model, 2))).backward()
    for layer in (adapter.up, adapter.down):
        assert layer.weight.grad.abs().max() > 0


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_parametrised_weight_is_used(name: str) -> None:
    model = small()
    doubled = copy.deepcopy(model)
    with torch.no_grad():
        doubled.get_submodule(name).weight *= 2
    parametrize.register_parametrization(model.get_submodule(name), "weight", Doubled())
    for actual, wanted in zip(predictions(model), predictions(doubled), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("change", [False, True], ids=["sees", "changes"])
def test_hooks_of_every_layer_are_called(kind: str, change: bool) -> None:
    model = small()
    before = predictions(model)
    called: dict[str, int] = dict.fromkeys(LAYERS, 0)
    for name in LAYERS:

        def hook(module: nn.Module, given: Any, output: Any = None, name: str = name) -> Any:
            called[name] += 1
            if not change:
                return None
            # Half of an index is an index too.
            return tuple(x // 2 for x in given) if output is None else 0 * output

        getattr(model.get_submodule(name), kind)(hook)
    after = predictions(model)
    assert set(called.values()) == {1}
    for a, b in zip(after, before, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5) != change


def test_a_backward_hook_is_called() -> None:
    model = small()
    called = []
    layer = model.stages[0].blocks[0].block2.w0
    layer.register_full_backward_hook(lambda *_: called.append(True))
    sum(p.mean() for p in model(**inputs_of(model, 2))).backward()
    assert called == [True]


class TwiceLinear(nn.Linear):
    """A layer with the weight of another one, that computes something else with it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_an_optimised_model_refuses_a_layer_that_computes_something_else() -> None:
    model = small()
    name = LINEAR[0]
    base = model.get_submodule(name)
    for layer in (nn.Linear, TwiceLinear):
        other = layer(base.in_features, base.out_features, bias=base.bias is not None)
        other.load_state_dict(base.state_dict())
        replace(model, name, other)
        if layer is nn.Linear:
            torch.testing.assert_close(
                optimize_for_inference(model, torch.float32)(**inputs_of(small(), 2)),
                predictions(model),
                rtol=1e-3,
                atol=1e-4,
            )
    with pytest.raises(ValueError, match=f"model: got TwiceLinear as {re.escape(name)}, expected"):
        optimize_for_inference(model)
