"""The whole model: a forward pass as a sampler runs it, and a training step, by each provider.

"published" is what the authors' code executes (baseline.py), under autocast where the row is not in
fp32, and "reference" ours in plain PyTorch, with weights in the row's dtype unless in training.
What is compiled keeps its activations, as a user of torch.compile would have it. Providers of one
row follow each other, and none is timed before its outputs, and in training its gradients, are as
accurate as the reference's. In fp32 the CPU's rows are judged by fp64, in bf16 by fp32.

A training step is forward, loss, backward and a step of fused AdamW on a batch that stays the same.
`flops` count no recomputation. With `--benchmark-disable` models are shallow and nothing is
compiled to machine code: that the rows run is the point.
"""

import copy
import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from baseline import PublishedDiMR
from flops import backward_flops, work
from gpu_part import OUT_OF_MEMORY
from harness import DEVICES, check_close, describe, name
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from dimr_fast import PRESETS, DiMR, DiMRConfig
from dimr_fast.diffusion import multi_scale_loss
from dimr_fast.inference import optimize_for_inference
from dimr_fast.optim import adamw
from dimr_fast.utils.device import keep_freed_memory

PUBLISHED, KEEPING = "published", "published, no checkpointing"
PUBLISHED_COMPILED, REFERENCE_COMPILED = "published, compiled", "reference, compiled"
OURS = "ours"
FORWARD = (PUBLISHED, PUBLISHED_COMPILED, REFERENCE_COMPILED, OURS)
TRAINING = (PUBLISHED, KEEPING, *FORWARD[1:])
EAGER = (PUBLISHED, OURS)
SECONDS = {"cpu": 4.0, "cuda": 2.0}
"""Time that a row is given; its rounds are as many as fit, within bounds. A GPU's differ less."""
ROUNDS = 5, 50
CHECKED = 4
"""Images of a batch whose predictions, and whose loss's gradients, are checked; the batch runs
whole, and no image depends on another."""

Run = Callable[..., list[Tensor]]


def _demo_size() -> DiMRConfig:
    demo = PRESETS["demo"]
    sizes = zip(demo.stage_configs, (160, 96, 48), (5, 4, 4), strict=True)
    branches = tuple(
        dataclasses.replace(branch, dim=width, hidden_dim=2 * width, num_blocks=depth)
        for branch, width, depth in sizes
    )
    return dataclasses.replace(demo, stage_configs=branches)


CONFIGS = {
    "XL/2R": PRESETS["DiMR-XL/2R"],
    "G/2R": PRESETS["DiMR-G/2R"],
    "XL/3R": PRESETS["DiMR-XL/3R"],
    "demo": PRESETS["demo"],
    "demo-size": _demo_size(),
}


@dataclass(frozen=True)
class Row:
    """What is timed, by whom and where. `shallow` models serve a run without timing."""

    device: str
    preset: str
    batch: int
    dtype: torch.dtype
    training: bool
    provider: str
    shallow: bool = False

    @property
    def title(self) -> str:
        return "training step" if self.training else "forward"

    @property
    def label(self) -> str:
        words = [self.device, self.preset, self.batch, name(self.dtype), self.title, self.provider]
        return "-".join(map(str, words)).replace(" ", "_")

    @property
    def config(self) -> DiMRConfig:
        config = CONFIGS[self.preset]
        if not self.shallow:
            return config
        branches = (dataclasses.replace(b, num_blocks=2) for b in config.stage_configs)
        return dataclasses.replace(config, stage_configs=tuple(branches))

    def autocast(self, enabled: bool = True) -> torch.autocast:
        enabled = enabled and self.dtype != torch.float32
        return torch.autocast(self.device, torch.bfloat16, enabled=enabled)


def rows() -> Iterator[Row]:
    fp32, bf16 = torch.float32, torch.bfloat16
    groups: dict[str, list[tuple[Any, ...]]] = {"cpu": [], "cuda": []}
    for dtype in (bf16, fp32):
        groups["cpu"] += [("demo", batch, dtype, False, FORWARD) for batch in (1, 32)]
        groups["cpu"].append(("demo", 32, dtype, True, TRAINING))
    groups["cpu"] += [
        ("demo-size", 64, bf16, True, TRAINING),
        ("XL/2R", 1, bf16, False, EAGER),
        ("XL/2R", 1, fp32, False, EAGER),
        ("G/2R", 1, bf16, False, EAGER),
        ("XL/3R", 1, bf16, False, EAGER),
        # Last, because compiling so large a model takes minutes.
        ("XL/2R", 1, bf16, False, (PUBLISHED_COMPILED,)),
    ]
    for preset in ("XL/2R", "G/2R", "XL/3R", "demo"):
        groups["cuda"] += [(preset, batch, bf16, False, FORWARD) for batch in (1, 64)]
        groups["cuda"].append((preset, 32, bf16, True, TRAINING))
        if preset == "XL/2R":
            groups["cuda"].append((preset, 64, bf16, True, EAGER))
    for device in DEVICES:
        for *settings, providers in groups[device]:
            yield from (Row(device, *settings, provider) for provider in providers)


@pytest.fixture(scope="module", autouse=True)
def _memory() -> None:
    """Every provider alike keeps the memory that it frees."""
    keep_freed_memory()


@pytest.mark.parametrize("row", [pytest.param(row, id=row.label) for row in rows()])
def test_model(benchmark: BenchmarkFixture, row: Row) -> None:
    row = dataclasses.replace(row, shallow=benchmark.disabled)
    try:
        measure(benchmark, row)
    except torch.OutOfMemoryError as error:
        reason = f"{OUT_OF_MEMORY}: {error}".split("\n")[0]
    else:
        return
    # Here, where the exception and with it the row's tensors are no longer referred to.
    free()
    pytest.skip(reason)


def free() -> None:
    """Return what a row took of the GPU's memory, for the next to have all of it."""
    torch.compiler.reset()
    _base.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(benchmark: BenchmarkFixture, row: Row) -> None:
    """Check a row, then time it; on a GPU its peak memory too."""
    inputs = draw(row)
    expected = outcomes(dataclasses.replace(row, provider=""))
    gc.collect()
    before = torch.cuda.memory_allocated() if row.device == "cuda" else 0
    run, model = provide(row)
    # What others wrote may round in another order; a wrong result is wrong by far more.
    times = 4 if row.provider.startswith(PUBLISHED) else 2
    for actual, *others in zip(outcome(row, run, model, inputs), *expected, strict=True):
        check_close(actual.cpu(), *others, times=times)
    call = (
        training_call(row, run, model, inputs)
        if row.training
        else partial(forward, row, run, inputs)
    )
    del model  # a sampler does not keep what it was made from
    benchmark.extra_info |= facts(row, inputs["x"])
    benchmark.pedantic(synchronised(row, call), rounds=_rounds(row, call), warmup_rounds=1)
    if row.device == "cuda":
        # Compiling and checking took more than a step does.
        torch.cuda.reset_peak_memory_stats()
        call()
        benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated() - before


def provide(row: Row) -> tuple[Run, DiMR]:
    """A provider, called as `DiMR`, and the model whose parameters it trains."""
    # On a GPU the memory is to be the provider's own; in training its weights change.
    model = base(row)
    if row.training or row.device == "cuda":
        model = copy.deepcopy(model)
    if row.provider == PUBLISHED:
        return PublishedDiMR.of(model), model
    if row.provider == KEEPING:
        return PublishedDiMR.of(model, checkpointing=False), model
    if row.provider == PUBLISHED_COMPILED:
        return compiled(row, PublishedDiMR.of(model, checkpointing=False)), model
    if row.provider == REFERENCE_COMPILED:
        if not row.training:
            model = copy.deepcopy(model).to(row.dtype)
        return compiled(row, model.set_implementation("reference")), model
    if row.training:
        return model, model
    return optimize_for_inference(model, dtype=row.dtype, cuda_graphs="auto"), model


def compiled(row: Row, model: torch.nn.Module) -> Run:
    """By Inductor, with CUDA graphs where a sampler would use them."""
    torch.compiler.reset()
    graphs = row.device == "cuda" and not row.training and not row.shallow
    return torch.compile(
        model,
        fullgraph=True,
        dynamic=False,
        backend="aot_eager" if row.shallow else "inductor",
        mode="reduce-overhead" if graphs else None,
    )


@lru_cache(maxsize=1)
def _base(config: DiMRConfig, device: str) -> DiMR:
    torch.manual_seed(0)
    with torch.device(device):
        model = DiMR(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # At the first step of a training nothing depends on time.
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def base(row: Row) -> DiMR:
    """The fp32 weights that every provider of a preset computes with."""
    return _base(row.config, row.device)


def draw(row: Row) -> dict[str, Tensor]:
    """x, times, classes and noise of a batch; a sampler's images share one time."""
    config, generator = row.config, torch.Generator().manual_seed(0)
    shape = row.batch, config.channels, *config.image_size
    times = row.batch if row.training else 1
    drawn = {
        # The same numbers in either dtype.
        "x": torch.randn(shape, generator=generator).to(row.dtype),
        "log_snr": 8 * torch.rand(times, generator=generator) - 4,
        "y": torch.randint(config.num_classes, (row.batch,), generator=generator),
        "noise": torch.randn(shape, generator=generator),
    }
    if row.training:
        drawn["x"] = drawn["x"].float()
    return {key: value.to(row.device) for key, value in drawn.items()}


def forward(row: Row, run: Run, inputs: dict[str, Tensor]) -> list[Tensor]:
    """One evaluation, without gradients."""
    published = row.provider.startswith(PUBLISHED)
    with torch.no_grad(), row.autocast(published):
        return run(inputs["x"], log_snr=inputs["log_snr"], y=inputs["y"])


def losses(row: Row, run: Run, inputs: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """The predictions, and each image's loss."""
    with row.autocast():
        predictions = run(inputs["x"], log_snr=inputs["log_snr"], y=inputs["y"])
    return predictions, multi_scale_loss(predictions, inputs["noise"])


def training_call(
    row: Row, run: Run, model: DiMR, inputs: dict[str, Tensor]
) -> Callable[[], object]:
    """A training step with the published settings of AdamW, in one fused update."""
    optimizer = adamw(model, 2e-4)

    def step() -> None:
        optimizer.zero_grad()
        losses(row, run, inputs)[1].mean().backward()
        optimizer.step()

    return step


def outcome(row: Row, run: Run, model: DiMR, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What is checked: each prediction and, in training, all gradients as one vector."""
    if not row.training:
        return [p[:CHECKED] for p in forward(row, run, inputs)]
    predictions, loss = losses(row, run, inputs)
    loss[:CHECKED].mean().backward()
    return [*(p[:CHECKED].detach() for p in predictions), _gradient(list(model.parameters()))]


@lru_cache(maxsize=1)
def outcomes(row: Row) -> tuple[list[Tensor], list[Tensor]]:
    """What the reference gives in the row's dtype, and in one of more digits, both on the CPU."""
    inputs = {k: v if len(v) == 1 else v[:CHECKED] for k, v in draw(row).items()}
    exact = torch.float64 if row.dtype == torch.float32 else torch.float32
    more = {k: v.to(exact) if v.is_floating_point() else v for k, v in inputs.items()}
    wide = dataclasses.replace(row, dtype=torch.float32)  # not under autocast
    weights = torch.float32 if row.training else row.dtype
    return _reference(row, weights, inputs), [t.double() for t in _reference(wide, exact, more)]


def _reference(row: Row, weights: torch.dtype, inputs: dict[str, Tensor]) -> list[Tensor]:
    model = copy.deepcopy(base(row)).to(weights).set_implementation("reference")
    return [t.cpu() for t in outcome(row, model, model, inputs)]


def _gradient(parameters: list[Tensor]) -> Tensor:
    """All gradients as one vector, which the parameters no longer keep."""
    missing = [p for p in parameters if p.grad is None]
    assert not missing, f"{len(missing)} parameters have no gradient"
    vector = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return vector


def facts(row: Row, x: Tensor) -> dict[str, Any]:
    """What the results file says of the row: work of a call, and the machine's ceilings now."""
    counted = work(row.config)
    flops = counted.flops + (backward_flops(row.config) if row.training else 0)
    described = describe("model", row.provider, x) | {
        "preset": row.preset,
        "batch": row.batch,
        "pass": row.title,
        "dtype": name(row.dtype),
        "flops": row.batch * flops,
    }
    if not row.training:
        described["bytes"] = round(row.batch * counted.bytes(row.batch, row.dtype.itemsize))
    return described | linear_rate(row) | copy_rate(row)


def linear_rate(row: Row) -> dict[str, float]:
    """TFLOP/s of `F.linear` at the products of the lowest branch's MLP, the better of the two."""
    branch = row.config.stage_configs[0]
    tokens = row.batch * branch.max_height * branch.max_width
    widths = branch.dim, branch.hidden_dim
    rates = []
    for inner, outer in itertools.permutations(widths):
        x = torch.randn(tokens, inner, device=row.device, dtype=row.dtype)
        weight = torch.randn(outer, inner, device=row.device, dtype=row.dtype)
        times = _short(row, lambda x=x, weight=weight: F.linear(x, weight))  # type: ignore[misc]
        rates.append([2e-12 * tokens * inner * outer / t for t in times])
    return _spread("gemm_tflops", max(rates, key=statistics.median))


def copy_rate(row: Row) -> dict[str, float]:
    """GB/s read and written by a copy that no cache holds."""
    source = torch.ones(2 ** (28 if row.device == "cuda" else 25), device=row.device)
    target = torch.empty_like(source)
    times = _short(row, lambda: target.copy_(source))
    return _spread("copy_gbps", [2e-9 * source.nbytes / t for t in times])


def _short(row: Row, call: Callable[[], object]) -> list[float]:
    """Seconds of a call, where on a GPU one alone would show its launch."""
    return _times(row, call, seconds=0.1, calls=20) if row.device == "cuda" else _times(row, call)


def _times(
    row: Row, call: Callable[[], object], seconds: float = 0.3, calls: int = 1
) -> list[float]:
    """Seconds of a call, in rounds of `calls`: two in a run without timing, or what fits."""
    run = synchronised(row, lambda: [call() for _ in range(calls)])
    run()
    found: list[float] = []
    end = time.perf_counter() + (0 if row.shallow else seconds)
    while len(found) < 2 or time.perf_counter() < end:
        begun = time.perf_counter()
        run()
        found.append((time.perf_counter() - begun) / calls)
    return found


def _spread(key: str, values: list[float]) -> dict[str, float]:
    """The median under that name, and the percentiles 20 and 80."""
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return {key: statistics.median(values), f"{key}_p20": p20, f"{key}_p80": p80}


def _rounds(row: Row, call: Callable[[], object]) -> int:
    if row.shallow:
        return 1
    low, high = ROUNDS
    took = min(_times(row, call, seconds=0))
    return min(max(round(SECONDS[row.device] / took), low), high)


def synchronised(row: Row, call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        call()
        if row.device == "cuda":
            torch.cuda.synchronize()

    return run
