"""The one rule by which every implementation of an operator is judged."""

from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where tests run Triton's kernels: on a GPU, or else on the CPU, interpreted."""


def seeded(*shape: int) -> torch.Tensor:
    """Standard normal numbers that depend on nothing but the shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def with_gradients(function: Function) -> Function:
    """`function`, returning its outputs and then the gradient of each tensor it is given.

    The outputs' own gradients are small multiples of 1/4: exact in every dtype, so that all
    precisions are asked for the same thing.
    """

    def run(*inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        outputs = _outputs(function(*leaves))
        generator = torch.Generator().manual_seed(0)
        grads = [
            (torch.randint(-8, 9, o.shape, generator=generator) / 4).to(o.device, o.dtype)
            for o in outputs
        ]
        wanted = [leaf for leaf in leaves if leaf is not None]
        found = torch.autograd.grad(outputs, wanted, grads)
        return (*(o.detach() for o in outputs), *found)

    return run


def assert_as_accurate(
    function: Function, reference: Function, *inputs: torch.Tensor | None, dtype: torch.dtype
) -> None:
    """Assert that `function` errs at most twice as much as `reference` run in `dtype`.

    Both are called on the inputs quantised to `dtype`; the truth is `reference` on those same
    values in float64. One rounding step of the output's scale is allowed on top. Outputs are a
    tensor or a tuple of tensors. A test of strided inputs makes them strided inside `function`.
    """
    quantised = [_to(t, dtype) for t in inputs]
    exact = _outputs(reference(*[_to(t, torch.float64) for t in quantised]))
    ours = _outputs(function(*quantised))
    theirs = _outputs(reference(*quantised))
    assert len(ours) == len(theirs) == len(exact)
    for i, (our, their, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert (our.shape, our.dtype, our.device) == (their.shape, their.dtype, their.device)
        if truth.numel() == 0:
            continue
        step = torch.finfo(our.dtype).eps * truth.abs().max()
        allowed = 2 * (their.double() - truth).abs().max() + step
        error = (our.double() - truth).abs().max()
        assert error <= allowed, f"output {i}: error {error:.3g}, allowed {allowed:.3g}"


def _to(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor


def _outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
