"""Check and time one row of an operator's benchmark."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.utils.names import FORWARD, FORWARD_AND_BACKWARD
from dimr_fast.ops import OPERATORS

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
COMPILE = "torch.compile"
"""Provider: `torch.compile` of the reference. The other providers are implementations."""
ROUNDS = 30
ROTATION = 8
"""Sets of inputs that a round on a GPU uses in turn, so that none is still in the L2 cache."""

Function = Callable[..., Any]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Row:
    """One provider of an operator on one device; `shape` is that of the first input."""

    operator: str
    provider: str
    preset: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    backward: bool

    @property
    def implementation(self) -> str:
        """Return the value of the operator's `implementation` argument."""
        return "reference" if self.provider == COMPILE else self.provider

    @property
    def size(self) -> int:
        """Return the number of elements of the first input."""
        return torch.Size(self.shape).numel()


def interpreted(provider: str, device: str) -> bool:
    """Return True for an interpreted kernel, which is run once but not timed."""
    return provider == "triton" and device == "cpu"


def parametrize_rows(
    operator: str,
    presets: Mapping[str, tuple[int, ...]],
    *,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    on_cpu: int = 1,
    gpu_batch: int = 64,
    backward: Sequence[bool] = (False, True),
) -> pytest.MarkDecorator:
    """Parametrise a benchmark with devices, dtypes, passes and providers.

    `presets` maps names to shapes without their batch dimension. On a GPU all of them are used with
    batch `gpu_batch`; on a CPU the first `on_cpu` with batch 1; interpreted kernels use the first.
    `backward` lists the passes: False is forward, True forward and backward.
    """
    found = []
    for device, dtype, with_backward, provider in itertools.product(
        DEVICES, dtypes, backward, [*OPERATORS[operator].names, COMPILE]
    ):
        batch, count = (gpu_batch, len(presets)) if device == "cuda" else (1, on_cpu)
        if interpreted(provider, device):
            count = 1
        for preset, shape in list(presets.items())[:count]:
            row = Row(operator, provider, preset, (batch, *shape), dtype, device, with_backward)
            passes = "forward+backward" if with_backward else "forward"
            title = "-".join([device, preset, dtype_name(dtype), passes, provider])
            found.append(pytest.param(row, id=title.replace(" ", "_")))
    return pytest.mark.parametrize("row", found)


def skip_unusable(operator: str, implementation: str, x: torch.Tensor) -> None:
    """Skip the row, with the reason, if the implementation cannot run on `x`."""
    reason = OPERATORS[operator].why_not(implementation, x)
    if reason is not None:
        pytest.skip(f"{implementation}: {reason}")


def check_and_time(
    benchmark: BenchmarkFixture,
    row: Row,
    function: Function,
    inputs: Callable[[torch.Generator], Sequence[torch.Tensor]],
    *,
    gradient_of: Sequence[int] | None = None,
    title: str | None = None,
    **facts: int,
) -> None:
    """Compare a row with the reference, then time it.

    `function(*tensors, implementation=…)` calls the operator. `inputs(generator)` draws its tensors
    in fp32 on the row's device. A forward row runs without gradients, a backward row runs forward
    and backward with the gradient of every tensor. With `gradient_of`, only the backward pass is
    timed, for the tensors with these indices. `title` names the pass; `facts`, such as `bytes` and
    `flops` per call, are added to the results.

    Raises AssertionError if the row is less accurate than `check_close` allows.
    """

    def draw(seed: int) -> list[torch.Tensor]:
        # Drawing on the CPU would take longer than everything else on a GPU.
        with torch.device(row.device):
            drawn = inputs(torch.Generator(row.device).manual_seed(seed))
        return [t.to(row.device, row.dtype) for t in drawn]

    first = draw(0)
    skip_unusable(row.operator, row.implementation, first[0])

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
    run_once = interpreted(row.provider, row.device)
    benchmark.extra_info |= describe(row.operator, row.provider, first[0]) | facts
    benchmark.extra_info |= {
        "preset": row.preset,
        "shape": list(row.shape),
        "pass": title or (FORWARD_AND_BACKWARD if row.backward else FORWARD),
        "interpreted": run_once,
        "calls": ROTATION if row.device == "cuda" else 1,
    }
    if row.device == "cuda":
        benchmark.pedantic(_graph(prepare), rounds=ROUNDS, warmup_rounds=3)
    else:
        rounds, warmup = (1, 0) if run_once else (ROUNDS, 3)
        benchmark.pedantic(prepare(0), rounds=rounds, warmup_rounds=warmup)


def _call(
    run: Function, tensors: Sequence[torch.Tensor], backward: bool
) -> Callable[[], Sequence[torch.Tensor]]:
    """Return a call that gives the outputs or, with `backward`, the gradients of `tensors`."""
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
    """Return a call of the backward pass alone, for the tensors with the `wanted` indices.

    The forward pass runs once. Buffer donation is disabled, since compiled code would otherwise
    overwrite the tensors it saved, and a second backward pass would fail.
    """
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    with torch._functorch.config.patch(donated_buffer=False):
        outputs = _outputs(run(*leaves))
    grads = [_gradient(output) for output in outputs]
    inputs = [leaves[i] for i in wanted]
    return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)


def _gradient(output: torch.Tensor) -> torch.Tensor:
    """Return random multiples of 1/4, which every dtype represents exactly."""
    generator = torch.Generator(output.device).manual_seed(0)
    quarters = torch.randint(-8, 9, output.shape, generator=generator, device=output.device)
    return (quarters / 4).to(output.dtype)


def _outputs(result: Any) -> Sequence[torch.Tensor]:
    return result if isinstance(result, tuple | list) else (result,)


def _graph(prepare: Callable[[int], Callable[[], Any]]) -> Callable[[], None]:
    """Return the replay of a CUDA graph of `ROTATION` calls, each with inputs of its own.

    A replay contains no launch overhead of Python.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Autograd runs a gradient on the stream of its forward pass: that must be the captured stream.
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
    """Raise AssertionError if `actual` is too inaccurate to be timed.

    Its largest error may be `times` that of `reference`, which is the reference in the same dtype,
    plus one rounding step at the output's scale. `exact` is the reference in fp64.
    """
    exact = exact.double()
    step = torch.finfo(actual.dtype).eps * exact.abs().max()
    allowed = times * (reference.double() - exact).abs().max() + step
    assert (actual.detach().double() - exact).abs().max() <= allowed


def describe(operator: str, implementation: str, x: torch.Tensor) -> dict[str, Any]:
    """Return the facts of a row that its results file states beside the times."""
    return {
        "operator": operator,
        "implementation": implementation,
        "shape": list(x.shape),
        "dtype": dtype_name(x.dtype),
        "device": torch.cuda.get_device_name(x.device) if x.is_cuda else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
