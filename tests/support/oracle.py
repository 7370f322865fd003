"""The accuracy rule for every implementation of an operator, and helpers to apply it."""

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from dimr_fast.ops import OPERATORS

Function = Callable[..., Any]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""The device on which tests run Triton kernels: a GPU or, interpreted, the CPU."""


def skip_module_without_triton() -> None:
    """Skip the tests of a module, with the reason, if Triton kernels cannot run.

    `aot` also imports the module, to compile its launches; for that, Triton alone is enough.
    """
    compiles_only = DEVICE == "cpu" and "TRITON_INTERPRET" not in os.environ
    x = torch.empty(1, device="meta" if compiles_only else DEVICE)
    reason = OPERATORS["td_rms_norm"].why_not("triton", x)
    if reason is not None:
        pytest.skip(f"triton: {reason}", allow_module_level=True)


def seeded(*shape: int) -> torch.Tensor:
    """Return standard normal numbers that depend only on the shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def with_gradients(function: Function) -> Function:
    """Return a function that returns the outputs of `function` and the gradients of its inputs.

    The gradients of the outputs are small multiples of 1/4, which are exact in every dtype, so that
    all precisions compute the same problem.
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
    function: Function,
    reference: Function,
    *inputs: torch.Tensor | None,
    dtype: torch.dtype,
    times: float = 2,
    names: Sequence[str] | None = None,
) -> None:
    """Assert that `function` errs at most `times` as much as `reference` run in `dtype`.

    Both are called on the inputs quantised to `dtype`; the truth is `reference` on those same
    values in float64. One rounding step of the output's scale is allowed on top. Outputs are a
    tensor or a tuple of tensors, `names` are theirs. A test of strided inputs makes them strided
    inside `function`. See `SAMPLES` for outputs of few elements.
    """
    quantised = [_to(t, dtype) for t in inputs]
    exact = _outputs(reference(*[_to(t, torch.float64) for t in quantised]))
    ours = _outputs(function(*quantised))
    theirs = _outputs(reference(*quantised))
    assert len(ours) == len(theirs) == len(exact)
    for i, (our, their, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert (our.shape, our.dtype, our.device) == (their.shape, their.dtype, their.device)

        def reference_errors(i: int = i) -> Iterator[torch.Tensor]:
            for seed in itertools.count():
                near = [neighbour(t, seed) for t in quantised]
                true = _outputs(reference(*[_to(t, torch.float64) for t in near]))[i]
                yield largest_error(_outputs(reference(*near))[i], true)

        reason = why_inaccurate(our, their, truth, reference_errors(), times)
        assert reason is None, f"{names[i] if names else f'output {i}'}: {reason}"


SAMPLES = 64
"""The number of errors from which the reference's largest error is estimated.

The largest of 4 errors is a poor estimate: of two equally accurate outputs (with normal errors) the
second has an error of more than twice the first one's largest in one case of nine; with 64 numbers,
in one of eight hundred (tests/ops/test_oracle.py). So if an output with few numbers exceeds the
allowed error, the reference is also run on neighbouring inputs, with each value moved by at most
one rounding step, and compared with its own truth for these inputs, until there are `SAMPLES`
errors. The largest of them counts. A kernel that is less accurate than the reference still fails.
"""


def why_inaccurate(
    our: torch.Tensor,
    their: torch.Tensor,
    truth: torch.Tensor,
    more: Iterator[torch.Tensor],
    times: float = 2,
) -> str | None:
    """Return how the error of `our` exceeds what is allowed, or None.

    `their` is the reference's output in the same dtype, `truth` in float64; `more` are the
    reference's largest errors on neighbouring inputs.
    """
    if truth.numel() == 0:
        return None
    info = torch.finfo(our.dtype)
    # Below the smallest normal number the precision is lower or zero.
    step = info.eps * truth.abs().max() + info.smallest_normal
    if our.dtype == torch.float64:
        # The truth is a float64 result too, with rounding errors of its own: `their` equals it. A
        # sum of some hundred terms in another order differs by a few steps.
        step *= 16
    error, reference = largest_error(our, truth), largest_error(their, truth)
    if not error <= times * reference + step:
        draws = math.ceil(SAMPLES / truth.numel()) - 1
        reference = max([reference, *itertools.islice(more, draws)])
    allowed = times * reference + step
    return None if error <= allowed else f"error {error:.3g}, allowed {allowed:.3g}"


def largest_error(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return (found.detach().double() - truth).abs().max()


def neighbour(value: Any, seed: int) -> Any:
    """Return a tensor with each number moved by one rounding step down or up, or not at all.

    Anything except a floating-point tensor is returned unchanged.
    """
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-1, 2, value.shape, generator=generator).to(value.device, torch.float64)
    # Relative to a number, 0.7 eps is 0.7 to 1.4 rounding steps, which round to one.
    return (value.double() * (1 + 0.7 * steps * torch.finfo(value.dtype).eps)).to(value.dtype)


def _to(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor


def _outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
