"""Random calls of the operators with bad inputs: each is refused, or answered rightly.

Run by `test_bad_inputs.py` as `python bad_inputs.py CALLS`; `--only NUMBER` repeats one call. Each
is logged before it is made, so that the last line of a process that died names what killed it.
"""

import argparse
import contextlib
import functools
import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from dimr_fast.ops import OPERATORS
from tests.support import operator_calls as calls
from tests.support import oracle

REFUSALS = (ValueError, TypeError, RuntimeError, MemoryError)
"""What a refusal is: of ours a ValueError or TypeError, of torch's dispatcher a RuntimeError.

Of a batch of 2^48 images, which an expanded tensor can pretend to have, it is a MemoryError.
"""

Mutation = Callable[[random.Random, Tensor], Any]
Move = Callable[[Any], Any]
"""A change to every argument: none, or to a neighbouring value."""
Expected = Callable[[Move], tuple[Any, Any]]
"""The answer in the same dtype, and the truth, for arguments moved so."""

DTYPES = [
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]
HUGE = [2**40, 2**48, 2**55, 2**59, 2**62]


def _dim(generator: random.Random, x: Tensor) -> int:
    return generator.randrange(x.dim())


def _resized(generator: random.Random, x: Tensor) -> Tensor:
    shape = list(x.shape)
    shape[_dim(generator, x)] = generator.choice([0, 1, 2, 3, 7])
    return torch.randn(shape)


def _expanded(x: Tensor, dim: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return x.narrow(dim, 0, 1).expand(shape)


def _strided(generator: random.Random, x: Tensor) -> Tensor:
    """The shape of `x` over fresh memory, which its elements share or leave gaps in."""
    strides = [generator.choice([0, 1, 1, 2, 3, 17]) for _ in x.shape]
    offset = generator.choice([0, 0, 1, 3])
    last = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    return torch.randn(max(0, last) + 1 + offset).as_strided(x.shape, strides, offset)


def _with_gaps(generator: random.Random, x: Tensor) -> Tensor:
    dim = _dim(generator, x)
    shape = list(x.shape)
    shape[dim] = 2 * shape[dim] + 1
    wide = torch.randn(shape)
    return wide.narrow(dim, 1, 2 * x.shape[dim]).unflatten(dim, (-1, 2)).select(dim + 1, 0)


def _transposed(generator: random.Random, x: Tensor) -> Tensor:
    return x.transpose(_dim(generator, x), _dim(generator, x))


def _permuted_memory(generator: random.Random, x: Tensor) -> Tensor:
    a, b = _dim(generator, x), _dim(generator, x)
    return x.transpose(a, b).contiguous().transpose(a, b)


TENSORS: list[Mutation] = [
    _resized,
    _strided,
    _strided,
    _with_gaps,
    _with_gaps,
    _transposed,
    _permuted_memory,
    lambda g, x: _expanded(x, _dim(g, x), x.shape[_dim(g, x)]),
    lambda g, x: _expanded(x, _dim(g, x), g.choice(HUGE)),
    lambda g, x: x.narrow(_dim(g, x), 0, 0),
    lambda g, x: x.unsqueeze(_dim(g, x)),
    lambda g, x: x[0],
    lambda g, x: x.flatten(),
    lambda g, x: x.sum(),
    lambda g, x: x.to(g.choice(DTYPES)),
    lambda g, x: x.to(g.choice([torch.bfloat16, torch.float16])),
    lambda g, x: x.to("meta"),
    lambda g, x: x.to_sparse(),
    lambda g, x: torch._neg_view(x),
    lambda g, x: torch._efficientzerotensor(x.shape),
    lambda g, x: torch.complex(x, x).conj(),
    lambda g, x: torch.nn.Parameter(x),
    lambda g, x: g.choice([None, 1.5, 3, "x", [], [x], (x, x), object(), torch.float32]),
]


def _mutate_leaf(generator: random.Random, leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return generator.choice(TENSORS)(generator, leaf)
    if isinstance(leaf, torch.dtype):
        return generator.choice([*DTYPES, torch.float32, None])
    if isinstance(leaf, bool):
        return generator.choice([not leaf, None, 2, "yes"])
    if leaf is None:
        return generator.choice([torch.randn(3), torch.randn(2, 3, 4), 0])
    return generator.choice([0, -1, 2, 2**31, 2**62, 2**63, 1.5, None])


def _grow(generator: random.Random, leaves: list[Any]) -> list[Any]:
    """All that are as large as the first tensor in its first dimension become huge, unallocated."""
    if not isinstance(leaves[0], Tensor) or not leaves[0].dim():
        return leaves
    size, huge = leaves[0].shape[0], generator.choice(HUGE)
    return [
        _expanded(leaf, 0, huge)
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size
        else leaf
        for leaf in leaves
    ]


def mutate(generator: random.Random, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments with up to three of them, or the list of them, made wrong."""
    leaves, structure = tree_flatten((args, kwargs))
    with contextlib.suppress(RuntimeError, IndexError, ValueError):
        # What torch itself does not make is left out, with what would have followed.
        if generator.random() < 0.2:
            dtype = generator.choice([torch.bfloat16, torch.float16, torch.float64])
            leaves = [leaf.to(dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        count = min(generator.choice([0, 1, 1, 1, 2, 3]), len(leaves))
        for place in generator.sample(range(len(leaves)), count):
            leaves[place] = _mutate_leaf(generator, leaves[place])
        if generator.random() < 0.05:
            leaves = _grow(generator, leaves)
    args, kwargs = tree_unflatten(leaves, structure)
    if generator.random() < 0.05:
        wrong = [args[:-1], (*args, args[0]), (), [args], (*args[:1], [])]
        args = generator.choice(wrong)
    if generator.random() < 0.02:
        kwargs = {**kwargs, "unknown": 1}
    return tuple(args), kwargs


def _public(generator: random.Random) -> tuple[str, Callable[..., Any], Any, Any, Any]:
    operators = sorted(calls.CASES) if generator.random() < 0.4 else calls.implemented_on_cpu()
    operator = generator.choice(operators or sorted(calls.CASES))
    call = calls.random_call(generator, operator)
    args, kwargs = mutate(generator, call.args, call.kwargs)
    if operator == "attention" and any(map(_is_zero_tensor, args)):
        # torch's scaled_dot_product_attention (2.13) reads memory that such a tensor has not.
        args = call.args
    names = ["auto", "cpu", "cpu", "cpu", "reference", *OPERATORS[operator].names, "no such"]
    implementation = generator.choice(names)

    def run(args: Any, implementation: str = implementation) -> Any:
        return calls.Call(operator, args, kwargs)(implementation)

    def same_dtype_and_truth(moved: Move) -> tuple[Any, Any]:
        near = tree_map(moved, args)
        return run(near, "reference"), run(tree_map(_doubled, near), "reference")

    return f"{operator} {implementation}", lambda: run(args), args, kwargs, same_dtype_and_truth


def _bare(
    generator: random.Random, recorded: list[Any]
) -> tuple[str, Callable[..., Any], Any, Any, Any]:
    function, given, given_kwargs = generator.choice(generator.choice(recorded))
    args, kwargs = mutate(generator, given, given_kwargs)

    def clean(moved: Move) -> tuple[Any, Any]:
        """The operator on the same values in memory of their own: what strides ought to mean."""
        own = function(*tree_map(lambda leaf: moved(_clean(leaf)), args), **kwargs)
        return own, tree_map(_doubled, own)

    return function.name(), lambda: function(*args, **kwargs), args, kwargs, clean


def _is_zero_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf._is_zerotensor()


def _doubled(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _clean(leaf: Any) -> Any:
    return (
        leaf.detach().clone(memory_format=torch.contiguous_format).resolve_neg()
        if isinstance(leaf, Tensor)
        else leaf
    )


def _why_wrong(answer: Any, expected: Expected) -> str | None:
    """Return what is wrong with an answer by the rule of `oracle`, or None."""
    ours, theirs, exact = (tree_flatten(t)[0] for t in (answer, *expected(_same)))
    if len(ours) != len(theirs):
        return f"{len(ours)} outputs, expected {len(theirs)}"
    for i, (our, their, true) in enumerate(zip(ours, theirs, exact, strict=True)):
        if (our.shape, our.dtype, our.device) != (their.shape, their.dtype, their.device):
            return f"got {_describe(our)}, expected {_describe(their)}"
        if our.is_meta or not torch.isfinite(true).all():
            continue

        def errors(i: int = i) -> Iterator[Tensor]:
            for seed in itertools.count():
                near, truth = expected(functools.partial(oracle.neighbour, seed=seed))
                yield oracle.largest_error(tree_flatten(near)[0][i], tree_flatten(truth)[0][i])

        if reason := oracle.why_inaccurate(our, their, true, errors()):
            return reason
    return None


def _same(leaf: Any) -> Any:
    return leaf


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    strides = value.stride() if value.layout == torch.strided else value.layout
    return f"<{value.dtype} {tuple(value.shape)} {strides} {value.device}>"


def _judge(run: Callable[[], Any], expected: Expected) -> tuple[str, str | None]:
    """What came of a call ("refused" or "answered"), and what is wrong with it, or None."""
    try:
        answer = run()
    except REFUSALS:
        return "refused", None
    except Exception as error:
        # What is no tensor where one belongs may lack what the check reads of it.
        if isinstance(error, AttributeError) and "'Tensor'" not in str(error):
            return "refused", None
        return "refused", f"{type(error).__name__}: {error}"
    try:
        wrong = _why_wrong(answer, expected)
    except Exception as error:
        if any(words in str(error) for words in ("can't allocate memory", "overflow")):
            return "answered", None
        return "answered", f"what the reference refuses: {type(error).__name__}: {error}"
    return "answered", wrong


def _record() -> list[Any]:
    """Valid calls of every operator that the CPU library registers, forward and backward."""
    recorder = calls.Recorder(most=30)
    for operator in calls.implemented_on_cpu():
        for size in calls.CASES[operator].edges:
            call = calls.call(operator, *size)
            tensors = [t for t in tree_flatten(call.args)[0] if isinstance(t, Tensor)]
            if OPERATORS[operator].why_not("cpu", tensors[0]) is None:
                with recorder:
                    outputs = tree_flatten(_requiring_grad(call)("cpu"))[0]
                    torch.autograd.backward(outputs, [torch.randn_like(o) for o in outputs])
    return [recorder.calls[name] for name in sorted(recorder.calls)]


def _requiring_grad(call: calls.Call) -> calls.Call:
    constants = calls.CASES[call.operator].constants
    leaves = tree_map(
        lambda t: t.requires_grad_() if isinstance(t, Tensor) else t, call.args[constants:]
    )
    return calls.Call(call.operator, (*call.args[:constants], *leaves), call.kwargs)


def run(count: int, only: int | None = None) -> None:
    """Make `count` calls; AssertionError at the end where one was neither refused nor right."""
    torch.manual_seed(0)
    recorded = _record()
    outcomes: Counter[str] = Counter()
    wrong = []
    for number in range(count) if only is None else [only]:
        generator = random.Random(number)
        torch.manual_seed(number)
        bare = recorded and generator.random() < 0.5
        title, call, args, kwargs, expected = (
            _bare(generator, recorded) if bare else _public(generator)
        )
        shown = f"{number}: {title} {tree_map(_describe, (args, kwargs))}"
        print(shown, flush=True)
        outcome, reason = _judge(call, expected)
        outcomes[f"{'bare' if bare else 'public'} {outcome}"] += 1
        if reason is not None:
            wrong.append(f"{shown}\n    {reason}")
    print(f"bad inputs: {dict(sorted(outcomes.items()))}")
    assert not wrong, "\n".join([f"{len(wrong)} wrong", *wrong[:20]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("calls", type=int)
    parser.add_argument("--only", type=int)
    options = parser.parse_args(sys.argv[1:])
    run(options.calls, options.only)
