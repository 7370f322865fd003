"""Run every operator of a CPU library built with sanitizers: edge shapes, then random bad inputs.

`tests/ops/test_sanitizers.py` runs `python -m tests.support.sanitized CALLS` with the sanitizers
preloaded, in a copy of the package that has this library. Each tensor of torch is an allocation of
its own, so that an access beyond either end of it is fatal.
"""

import functools
import sys
from itertools import product
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from dimr_fast import DiMR, _extension, optimize_for_inference
from dimr_fast.config import NORM_TYPES
from dimr_fast.ops import OPERATORS
from tests.support import bad_inputs
from tests.support import operator_calls as calls
from tests.support.oracle import assert_as_accurate, with_gradients

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(call: calls.Call, dtype: torch.dtype) -> None:
    """Forward and gradients of a call by the CPU library, judged by the oracle rule."""
    leaves, structure = tree_flatten((call.args, call.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def run(implementation: str) -> Any:
        def function(*tensors: torch.Tensor) -> Any:
            given = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                given[place] = tensor
            args, kwargs = tree_unflatten(given, structure)
            return calls.Call(call.operator, args, kwargs)(implementation)

        return function

    def gradients(function: Any) -> Any:
        constants = calls.CASES[call.operator].constants

        def both(*tensors: torch.Tensor) -> Any:
            given = functools.partial(function, *tensors[:constants])
            return with_gradients(given)(*tensors[constants:])

        return both

    tensors = [leaves[place] for place in places]
    ours, reference = run("cpu"), run("reference")
    assert_as_accurate(ours, reference, *tensors, dtype=dtype)
    assert_as_accurate(gradients(ours), gradients(reference), *tensors, dtype=dtype)


def run_model(norm_type: str, dtype: torch.dtype, quantize: Any) -> None:
    """Run the branches of a small model, one call each."""
    torch.manual_seed(0)
    model = DiMR.from_preset("tiny", norm_type=norm_type)
    optimised = optimize_for_inference(model, dtype, quantize=quantize)
    assert optimised.uses_cpu_library
    x, y = torch.randn(2, 3, 16, 16), torch.tensor([0, 6])
    with torch.no_grad():
        expected = model.set_implementation("reference")(x, log_snr=torch.zeros(1), y=y)
    for a, b in zip(optimised(x, log_snr=torch.zeros(1), y=y), expected, strict=True):
        assert (a - b).norm() <= 0.05 * b.norm()


def edges() -> None:
    """Every operator at its edges, in every instruction set of this processor."""
    before = calls.registered()
    reason = _extension.why_not("cpu")
    assert reason is None, reason
    sets = [name for name in _extension.INSTRUCTION_SETS if _extension.use_instruction_set(name)]
    recorder = calls.Recorder(most=1)
    count = 0
    for instruction_set in sets:
        assert _extension.use_instruction_set(instruction_set)
        for operator in calls.implemented_on_cpu():
            for size in calls.CASES[operator].edges:
                torch.manual_seed(0)
                call = calls.call(operator, *size)
                first = tree_flatten(call.args)[0][0]
                if OPERATORS[operator].why_not("cpu", first) is not None:
                    continue
                for dtype in DTYPES:
                    print(instruction_set, operator, size, dtype, flush=True)
                    with recorder:
                        check(call, dtype)
                    count += 1
        for norm_type, dtype, quantize in product(NORM_TYPES, DTYPES, (None, "int8")):
            print(instruction_set, "branch", norm_type, dtype, quantize, flush=True)
            with recorder:
                run_model(norm_type, dtype, quantize)
            count += 1
        print(instruction_set, "weight_gradient", flush=True)
        for rows, height, widths in ((1, 1, (1,)), (131, 97, (33, 5)), (2, 8, (48,))):
            dy, *inputs = (torch.randn(rows, n).bfloat16() for n in (height, *widths))
            with recorder:
                dweight, _ = torch.ops.dimr_fast.weight_gradient(dy, inputs)
            expected = dy.double().mT @ torch.cat(inputs, 1).double()
            torch.testing.assert_close(dweight.double(), expected, rtol=1e-4, atol=1e-4)
            count += 1
    untried = calls.registered() - before - set(recorder.calls)
    assert not untried, f"never called: {untried}"
    print(f"edges: {count} calls by {', '.join(sets)}")


if __name__ == "__main__":
    edges()
    bad_inputs.run(int(sys.argv[1]))
