"""What every benchmark does: choose devices, check before timing, time, describe the row."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from dimr_fast.ops import OPERATORS

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
COMPILE = "torch.compile"
"""The provider that is `torch.compile` of the reference, beside an operator's implementations."""
ROUNDS = 30
ROTATION = 8
"""Input sets that a round on a GPU goes through, so that none is still in the L2 cache."""

Function = Callable[..., Any]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Row:
    """One provider of an operator, at one shape of the first input, on one device."""

    operator: str
    provider: str
    preset: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    backward: bool

    @property
    def implementation(self) -> str:
        return "reference" if self.provider == COMPILE else self.provider

    @property
    def size(self) -> int:
        """Elements of the first input."""
        return torch.Size(self.shape).numel()


def interpreted(provider: str, device: str) -> bool:
    """Whether a row only proves that it runs: interpreted kernels' times say nothing."""
    return provider == "triton" and device == "cpu"


def rows(
    operator: str,
    presets: dict[str, tuple[int, ...]],
    *,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    on_cpu: int = 1,
    gpu_batch: int = 64,
) -> pytest.MarkDecorator:
    """Parametrise a benchmark with every implementation and torch.compile, both passes.

    `presets` are shapes without their batch, which is 1 on a CPU: all of them on a GPU, the first
    `on_cpu` on a CPU, of interpreted kernels the first.
    """
    found = []
    for device, dtype, backward, provider in itertools.product(
        DEVICES, dtypes, (False, True), [*OPERATORS[operator].names, COMPILE]
    ):
        batch, count = (gpu_batch, len(presets)) if device == "cuda" else (1, on_cpu)
        if interpreted(provider, device):
            count = 1
        for preset, shape in list(presets.items())[:count]:
            row = Row(operator, provider, preset, (batch, *shape), dtype, device, backward)
            passes = "forward+backward" if backward else "forward"
            title = "-".join([device, preset, name(dtype), passes, provider])
            found.append(pytest.param(row, id=title.replace(" ", "_")))
    return pytest.mark.parametrize("row", found)


def usable(operator: str, implementation: str, x: torch.Tensor) -> None:
    """Skip the row, with the reason, where the implementation cannot run on `x`."""
    reason = OPERATORS[operator].why_not(implementation, x)
    if reason is not None:
        pytest.skip(f"{implementation}: {reason}")


def compare(
    benchmark: BenchmarkFixture,
    row: Row,
    function: Function,
    inputs: Callable[[torch.Generator], Sequence[torch.Tensor]],
    *,
    gradient_of: Sequence[int] | None = None,
    title: str | None = None,
    **facts: int,
) -> None:
    """Check and time a row.

    `function(*tensors, implementation=…)` is the operator; `inputs(generator)` draws its tensors in
    fp32 on the row's device. A forward row runs without grad, a backward row forward and backward,
    with the gradient of every tensor. With `gradient_of`, the backward pass alone is timed, for
    those of the tensors. `title` names the pass, and `facts`, such as `bytes` and `flops` of a
    call, go into the results with it.
    """

    def draw(seed: int) -> list[torch.Tensor]:
        # A CPU would take longer over random numbers for a GPU than all the rest takes.
        with torch.device(row.device):
            drawn = inputs(torch.Generator(row.device).manual_seed(seed))
        return [t.to(row.device, row.dtype) for t in drawn]

    first = draw(0)
    usable(row.operator, row.implementation, first[0])

    def plain(*tensors: torch.Tensor) -> Any:
        return function(*tensors, implementation=row.implementation)

    run = plain
    if row.provider == COMPILE:
        torch.compiler.reset()
        run = torch.compile(plain, fullgraph=True, dynamic=False)

    def call(run: Function, tensors: Sequence[torch.Tensor]) -> Callable[[], Any]:
        if gradient_of is not None:
            return _gradient_call(run, tensors, gradient_of)
        return _call(run, tensors, row.backward)

    def prepare(seed: int) -> Callable[[], Sequence[torch.Tensor]]:
        return call(run, draw(seed))

    def reference(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        return call(lambda *t: function(*t, implementation="reference"), tensors)()

    exact = reference([t.double() for t in first])
    for actual, same_dtype, truth in zip(prepare(0)(), reference(first), exact, strict=True):
        check_close(actual, same_dtype, truth)
    proof = interpreted(row.provider, row.device)
    benchmark.extra_info |= describe(row.operator, row.provider, first[0]) | facts
    benchmark.extra_info |= {
        "preset": row.preset,
        "shape": list(row.shape),
        "pass": title or ("forward + backward" if row.backward else "forward"),
        "interpreted": proof,
        "calls": ROTATION if row.device == "cuda" else 1,
    }
    if row.device == "cuda":
        benchmark.pedantic(_graph(prepare), rounds=ROUNDS, warmup_rounds=3)
    else:
        rounds, warmup = (1, 0) if proof else (ROUNDS, 3)
        benchmark.pedantic(prepare(0), rounds=rounds, warmup_rounds=warmup)


def _call(
    run: Function, tensors: Sequence[torch.Tensor], backward: bool
) -> Callable[[], Sequence[torch.Tensor]]:
    """A call on `tensors` that returns the outputs or, with `backward`, the inputs' gradients."""
    if not backward:

        def forward() -> Sequence[torch.Tensor]:
            with torch.no_grad():
                return _outputs(run(*tensors))

        return forward

    leaves = [t.detach().requires_grad_() for t in tensors]
    grads = [_gradient(output) for output in _outputs(run(*leaves))]

    def both() -> Sequence[torch.Tensor]:
        return torch.autograd.grad(_outputs(run(*leaves)), leaves, grads)

    return both


def _gradient_call(
    run: Function, tensors: Sequence[torch.Tensor], wanted: Sequence[int]
) -> Callable[[], Sequence[torch.Tensor]]:
    """The backward pass of a call on `tensors`: the gradients of the wanted ones, again and again.

    The forward pass runs once. Compiled code may otherwise reuse what it saved, and runs once too.
    """
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    with torch._functorch.config.patch(donated_buffer=False):
        outputs = _outputs(run(*leaves))
    grads = [_gradient(output) for output in outputs]
    inputs = [leaves[i] for i in wanted]
    return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)


def _gradient(output: torch.Tensor) -> torch.Tensor:
    """Random multiples of 1/4: the same numbers in every dtype."""
    generator = torch.Generator(output.device).manual_seed(0)
    quarters = torch.randint(-8, 9, output.shape, generator=generator, device=output.device)
    return (quarters / 4).to(output.dtype)


def _outputs(result: Any) -> Sequence[torch.Tensor]:
    return result if isinstance(result, tuple | list) else (result,)


def _graph(prepare: Callable[[int], Callable[[], Any]]) -> Callable[[], None]:
    """`ROTATION` calls, each on its own inputs, as one CUDA graph: launches cost nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # A gradient runs on the stream of its forward pass, which has to be the one that is captured.
    with torch.cuda.stream(stream):
        calls = [prepare(seed) for seed in range(ROTATION)]
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def check_close(
    actual: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor, times: float = 2
) -> None:
    """A wrong kernel is not timed: its error is at most so many `times` that of `reference`, in the
    same dtype, plus one rounding step of the output's scale; `exact` is the reference in fp64.
    """
    step = torch.finfo(actual.dtype).eps * exact.abs().max()
    allowed = times * (reference.double() - exact).abs().max() + step
    assert (actual.detach().double() - exact).abs().max() <= allowed


def describe(operator: str, implementation: str, x: torch.Tensor) -> dict[str, Any]:
    """What a results file says of a row, beside its times."""
    return {
        "operator": operator,
        "implementation": implementation,
        "shape": list(x.shape),
        "dtype": name(x.dtype),
        "device": torch.cuda.get_device_name(x.device) if x.is_cuda else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
