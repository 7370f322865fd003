"""Calls of every public operator with arguments that fit, for the gates that take in all of them.

An operator that the CPU library implements and that is missing here fails those gates.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dimr_fast import ops
from dimr_fast.ops import OPERATORS


@dataclass(frozen=True)
class Call:
    """A public operator and its arguments; all tensors are fp32 and contiguous."""

    operator: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, implementation: str) -> Any:
        function = getattr(ops, self.operator)
        return function(*self.args, **self.kwargs, implementation=implementation)


@dataclass(frozen=True)
class Case:
    """How to call an operator at a size: the sizes at its edges, and the bounds of random ones."""

    arguments: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]
    edges: Sequence[tuple[int, ...]]
    bounds: Sequence[tuple[int, int]]
    constants: int = 0
    """How many of the first tensors only the reference has a gradient of."""


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def _depthwise_conv2d(b: int, h: int, w: int, d: int, half: int, bias: int, residual: int) -> Any:
    k = 2 * half + 1
    values = normal(d) if bias else None
    return (normal(b, h, w, d), normal(d, 1, k, k), values), {"residual": bool(residual)}


def _times(shared: int, b: int, d: int) -> torch.Tensor:
    return normal(1 if shared else b, d)


def _residual(with_it: int, *shape: int) -> torch.Tensor | None:
    return normal(*shape) if with_it else None


def _layers(count: int, d: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and biases of linear layers on features of width `d`."""
    return [normal(3 + i, d) for i in range(count)], [normal(3 + i) for i in range(count)]


def _td_rms_norm(b: int, n: int, d: int, shared: int, residual: int) -> Any:
    args = normal(b, n, d), _times(shared, b, d), _residual(residual, b, n, d)
    return (*args, *_layers(2 * residual, d)), {}


def _td_layer_norm(b: int, n: int, d: int, shared: int, residual: int) -> Any:
    weight, bias = _times(shared, b, d), _times(residual, b, d)
    args = normal(b, n, d), weight, bias, _residual(residual, b, n, d)
    return (*args, *_layers(2 * residual, d)), {}


def _rms_norm(b: int, n: int, d: int, residual: int) -> Any:
    return (normal(b, n, d), normal(d), _residual(residual, b, n, d)), {}


def _gated_gelu(b: int, n: int, hidden: int, layers: int) -> Any:
    return (3 * normal(b, n, 2 * hidden), *_layers(layers, hidden)), {}


def _upsample_add(b: int, h: int, w: int, q: int, d: int, slots: int, low: int, shared: int) -> Any:
    features = [normal(b, h, w, low) for _ in range(slots)]
    buffer = torch.stack(features, -2) if shared else features
    width = slots * low
    norm_in = _times(shared, b, width), _times(shared, b, width)
    norm_out = _times(shared, b, d), _times(shared, b, d)
    x, weight = normal(b, h * q, w * q, d), normal(d * q * q, width) / width**0.5
    return (x, buffer, norm_in, weight, normal(d * q * q), norm_out), {}


def _td_parameters(times: int, width: int, count: int) -> Any:
    parameters = [tuple(normal(width + i) for _ in range(4)) for i in range(count)]
    return (normal(times), parameters), {}


def _attention(b: int, n: int, heads: int, head_dim: int) -> Any:
    return (normal(b, n, 3 * heads * head_dim), heads), {}


FLAG = (0, 1)
NORMS = [(1, 1, 2), (2, 3, 5), (3, 1, 16), (1, 7, 17), (2, 5, 33), (1, 2, 127), (2, 2, 480)]

CASES = {
    "depthwise_conv2d": Case(
        _depthwise_conv2d,
        [
            (*size, bias, residual)
            for bias, residual in ((1, 0), (0, 1))
            for size in (
                (1, 1, 1, 1, 0),
                (1, 1, 1, 17, 3),
                (3, 5, 1, 1, 1),
                (2, 2, 33, 15, 2),
                (1, 9, 8, 32, 3),
                (2, 4, 7, 33, 1),
                (1, 3, 17, 8, 4),
                (1, 20, 3, 5, 5),
                (0, 4, 5, 6, 1),
            )
        ],
        [(0, 3), (1, 9), (1, 18), (1, 34), (0, 4), FLAG, FLAG],
    ),
    "td_rms_norm": Case(
        _td_rms_norm,
        [(*s, *f) for s in [*NORMS, (0, 3, 4)] for f in ((0, 0), (1, 1))],
        [(0, 3), (1, 9), (1, 40), FLAG, FLAG],
    ),
    "td_layer_norm": Case(
        _td_layer_norm,
        [(*s, *f) for s in [*NORMS[1:], (0, 3, 4)] for f in ((0, 0), (1, 1))],
        [(0, 3), (1, 9), (2, 40), FLAG, FLAG],
    ),
    "rms_norm": Case(
        _rms_norm, [(*s, f) for s in NORMS for f in FLAG], [(0, 3), (1, 9), (1, 40), FLAG]
    ),
    "gated_gelu": Case(
        _gated_gelu,
        [(*s, f) for s in [*NORMS, (0, 3, 4), (2, 0, 4)] for f in FLAG],
        [(0, 3), (0, 9), (1, 40), FLAG],
    ),
    "upsample_add": Case(
        _upsample_add,
        [
            (1, 1, 1, 1, 2, 1, 2, 0),
            (2, 3, 2, 2, 5, 3, 7, 0),
            (3, 2, 3, 2, 17, 2, 16, 1),
            (1, 1, 2, 3, 33, 4, 9, 1),
            (2, 4, 4, 2, 48, 3, 40, 0),
        ],
        [(1, 3), (1, 4), (1, 4), (1, 3), (2, 20), (1, 4), (2, 20), FLAG],
    ),
    "td_parameters": Case(
        _td_parameters, [(1, 1, 1), (3, 17, 3), (2, 33, 4)], [(1, 4), (1, 40), (0, 4)], constants=1
    ),
    "attention": Case(_attention, [(1, 1, 1, 4), (2, 7, 3, 20)], [(0, 3), (1, 9), (1, 4), (1, 20)]),
}


def call(operator: str, *size: int) -> Call:
    args, kwargs = CASES[operator].arguments(*size)
    return Call(operator, args, kwargs)


def random_call(generator: random.Random, operator: str) -> Call:
    return call(operator, *(generator.randint(*bounds) for bounds in CASES[operator].bounds))


def implemented_on_cpu() -> list[str]:
    """The public operators that the CPU library implements, each of which has a case."""
    found = [name for name, choices in OPERATORS.items() if "cpu" in choices.names]
    assert set(found) <= set(CASES), f"no case for {set(found) - set(CASES)}"
    return found


def registered() -> set[str]:
    """Registered operators with a kernel on the CPU, such as "dimr_fast::depthwise_conv2d_fwd"."""
    return {
        name
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("dimr_fast::")
        and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    }


class Recorder(TorchDispatchMode):
    """Keeps the first calls of each registered operator that are made under it."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.calls: dict[str, list[tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "dimr_fast":
            name = func.name().removesuffix(".default")
            calls = self.calls.setdefault(name, [])
            if len(calls) < self.most:
                calls.append((func, args, kwargs))
        return func(*args, **kwargs)
