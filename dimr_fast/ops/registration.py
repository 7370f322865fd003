"""Registration of an operator: its implementations, kernels and gradient.

A file of this package defines an operator in five steps:

1. `operator = Operator(name, TRITON, CPU, example=...)`, implementations in order of preference;
2. a public function that checks its arguments, selects an implementation and runs it;
3. `fwd = operator.define("fwd", schema, shapes)` and the same for "bwd": PyTorch operators
   `dimr_fast::<name>_fwd` and `dimr_fast::<name>_bwd`;
4. `forward` and `backward`, which call those operators;
5. `run = differentiable(forward, backward)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import register_flop_formula

from dimr_fast.ops.implementations import Implementations, WhyNot, never

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Implementation:
    """One implementation of an operator, e.g. "triton".

    `why_not` returns why it cannot run on an input, `slower` why "auto" skips it where it can run.
    `overload` is the overload of the PyTorch operator that it implements, None where it does not
    run a kernel of ours. `load` takes the names of an operator and a direction and returns the
    Python function to call; None where a compiled library registers the kernel itself.
    """

    name: str
    why_not: WhyNot
    slower: WhyNot = never
    overload: str | None = None
    load: Callable[[str, str], Kernel] | None = None


class Operator(Implementations):
    """An operator: the choice between its implementations and the registration of their kernels.

    `implementations` are in the order in which "auto" tries them; "reference" comes last.
    """

    def __init__(
        self, name: str, *implementations: Implementation, example: tuple[int, ...]
    ) -> None:
        super().__init__(
            name,
            example=example,
            slower={i.name: i.slower for i in implementations},
            **{i.name: i.why_not for i in implementations},
        )
        self._with_kernels = [i for i in implementations if i.overload is not None]

    def define(
        self,
        direction: str,
        schema: str,
        shapes: Callable[..., Any],
        *only: str,
        flops: Callable[..., int] | None = None,
    ) -> dict[str, Kernel]:
        """Define `dimr_fast::<operator>_<direction>` and return it by implementation.

        Implementations are overloads of this PyTorch operator with one `schema`. `shapes` allocates
        the outputs for given inputs; it serves `torch.compile` and the meta device. `only` names
        the implementations that have a kernel for this direction; by default all of them. `flops`
        serves `torch.utils.flop_counter`: it takes the arguments with shapes in place of tensors,
        and returns the count, two for each multiply-add. Like PyTorch, only operators that multiply
        matrices or convolve have it.
        """
        packet = f"{self.operator}_{direction}"
        kernels: dict[str, Kernel] = {}
        defined: set[str] = set()
        for implementation in self._with_kernels:
            overload = implementation.overload
            if overload is None or (only and implementation.name not in only):
                continue
            if overload not in defined:
                name = f"dimr_fast::{packet}"
                name += "" if overload == "default" else f".{overload}"
                torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
                torch.library.register_fake(name, _on_one_device(name, shapes))
                if implementation.load is not None:
                    kernel = implementation.load(self.operator, direction)
                    torch.library.impl(name, ("cpu", "cuda"))(kernel)
                defined.add(overload)
            kernels[implementation.name] = getattr(getattr(torch.ops.dimr_fast, packet), overload)
        if flops is not None:
            register_flop_formula(getattr(torch.ops.dimr_fast, packet))(flops)
        return kernels


def _on_one_device(name: str, shapes: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `shapes` so that it raises ValueError for tensors on different devices.

    PyTorch calls the shape rule as soon as one tensor is on the meta device. Without this check its
    uninitialised outputs on a real device would be taken for results.
    """

    def checked(*args: Any) -> Any:
        devices = {leaf.device for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"{name}: got tensors on {found}, expected one device")
        return shapes(*args)

    return checked


def differentiable(
    forward: Callable[..., Any], backward: Callable[..., tuple[torch.Tensor | None, ...]]
) -> Callable[..., Any]:
    """Return a function that computes `forward` and has the gradient `backward`.

    `forward(ctx, *inputs)` returns the outputs and saves in `ctx` what `backward` needs.
    `backward(ctx, *grads)` returns one gradient for each input, None for an input without one. An
    outer `torch.autograd.Function` costs less time per call than `torch.library.register_autograd`.

    Every other derivative raises NotImplementedError: second ones, forward-mode AD, transforms of
    torch.func.
    """
    name = forward.__module__.rpartition(".")[2]

    def once(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        # `create_graph=True`: only a use of the second derivative is an error.
        return _Once.apply(name, torch.empty(0, requires_grad=True), *found)

    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> None:
        raise _not_here(name, "forward-mode AD")

    members = {"forward": staticmethod(forward), "backward": staticmethod(once)}
    traced: type[torch.autograd.Function] = type(name, (torch.autograd.Function,), members)
    # torch.compile does not trace a function that has a jvp.
    eager: type[torch.autograd.Function] = type(name, (traced,), {"jvp": staticmethod(jvp)})

    def run(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return traced.apply(*inputs)
        if torch._C._are_functorch_transforms_active():
            raise _not_here(name, "a transform of torch.func")
        return eager.apply(*inputs)

    return run


class _Once(torch.autograd.Function):
    """Returns gradients unchanged; raises if they are differentiated."""

    @staticmethod
    def forward(ctx: Any, name: str, trigger: torch.Tensor, *gradients: Any) -> tuple[Any, ...]:
        # `trigger` requires a gradient, so that the outputs do.
        ctx.name = name
        return gradients

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise _not_here(ctx.name, "a second derivative")


def _not_here(operator: str, wanted: str) -> NotImplementedError:
    return NotImplementedError(
        f'{operator}: got {wanted}, which only implementation="reference" (plain PyTorch) has: '
        'call model.set_implementation("reference")'
    )


def compiled_operator(name: str, schema: str) -> Kernel:
    """Define `dimr_fast::<name>`, which only a compiled library implements, and return it."""
    torch.library.define(f"dimr_fast::{name}", schema)
    return getattr(torch.ops.dimr_fast, name).default
