"""Time the whole model: a forward pass as a sampler calls it, and a training step.

Providers: "published" is the authors' execution (`published.py`), under autocast unless the row is
in fp32; "reference" is our model in plain PyTorch, with weights in the row's dtype except in
training; "ours" is `optimize_for_inference`, or our model in training. "ours, fp8" quantises it,
"torchao fp8" the published execution. Compiled providers keep their activations, as a user of
torch.compile would have it. The providers of a row run one after another. Before timing, the
outputs, and in training the gradients, of each are compared with the reference: in fp32 against
fp64, in bf16 against fp32.

A training step is forward, loss, backward and a fused AdamW step, always on the same batch. `flops`
count no recomputation. With `--benchmark-disable` models are shallow and compilation stops before
machine code, which only shows that the rows run.
"""

import copy
import dataclasses
import gc
import importlib.util
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
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.model.flops import backward_flops, work
from benchmarks.model.published import PublishedDiMR
from benchmarks.ops.harness import DEVICES, check_close, describe, dtype_name
from benchmarks.utils.names import (
    FORWARD,
    FP8_PROVIDERS,
    OURS,
    OURS_FP8,
    OURS_INT8,
    OUT_OF_MEMORY,
    PROVIDERS,
    PUBLISHED,
    PUBLISHED_COMPILED,
    PUBLISHED_NO_CHECKPOINTING,
    REFERENCE_COMPILED,
    TORCHAO_FP8,
    TRAINING,
)
from benchmarks.utils.spread import Spread
from dimr_fast import PRESETS, DiMR, DiMRConfig
from dimr_fast.diffusion import multi_scale_loss
from dimr_fast.inference import Quantization, optimize_for_inference
from dimr_fast.ops import why_not_fp8
from dimr_fast.optim import adamw
from dimr_fast.utils.device import keep_freed_memory

FORWARD_PROVIDERS = (PUBLISHED, PUBLISHED_COMPILED, REFERENCE_COMPILED, OURS)
CPU_BF16_PROVIDERS = (*FORWARD_PROVIDERS, OURS_INT8)
EAGER_PROVIDERS = (PUBLISHED, OURS)
QUANTIZED: dict[str, Quantization] = {OURS_FP8: "fp8", OURS_INT8: "int8"}
SECONDS = {"cpu": 4.0, "cuda": 2.0}
"""Timing per row and device; a GPU needs less, since its times vary less."""
MIN_ROUNDS, MAX_ROUNDS = 5, 50
CHECKED = 4
"""Images per batch whose predictions and gradients are checked. The whole batch runs, and images
are independent of one another."""

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
    """One provider of a pass of a model on a device. `shallow` replaces it by one of few blocks."""

    device: str
    preset: str
    batch: int
    dtype: torch.dtype
    training: bool
    provider: str
    shallow: bool = False

    @property
    def title(self) -> str:
        """Return the name of the pass."""
        return TRAINING if self.training else FORWARD

    @property
    def label(self) -> str:
        """Return the row's name for pytest."""
        words = [
            self.device,
            self.preset,
            self.batch,
            dtype_name(self.dtype),
            self.title,
            self.provider,
        ]
        return "-".join(map(str, words)).replace(" ", "_")

    @property
    def config(self) -> DiMRConfig:
        """Return the model's configuration, with two blocks a branch if `shallow`."""
        config = CONFIGS[self.preset]
        if not self.shallow:
            return config
        branches = (dataclasses.replace(b, num_blocks=2) for b in config.stage_configs)
        return dataclasses.replace(config, stage_configs=tuple(branches))

    def autocast(self, enabled: bool = True) -> torch.autocast:
        """Return bfloat16 autocast, disabled if the row is in fp32."""
        enabled = enabled and self.dtype != torch.float32
        return torch.autocast(self.device, torch.bfloat16, enabled=enabled)


def rows() -> Iterator[Row]:
    """Return the rows for the devices of this machine."""
    fp32, bf16 = torch.float32, torch.bfloat16
    groups: dict[str, list[tuple[Any, ...]]] = {"cpu": [], "cuda": []}
    for dtype, providers in ((bf16, CPU_BF16_PROVIDERS), (fp32, FORWARD_PROVIDERS)):
        groups["cpu"] += [("demo", batch, dtype, False, providers) for batch in (1, 32)]
        groups["cpu"].append(("demo", 32, dtype, True, PROVIDERS))
    eager = (*EAGER_PROVIDERS, OURS_INT8)
    groups["cpu"] += [
        ("demo-size", 64, bf16, True, PROVIDERS),
        # Compiling so large a model takes minutes.
        ("XL/2R", 1, bf16, False, (*eager, REFERENCE_COMPILED)),
        ("XL/2R", 4, bf16, False, (*eager, REFERENCE_COMPILED)),
        ("XL/2R", 1, fp32, False, EAGER_PROVIDERS),
        ("G/2R", 1, bf16, False, eager),
        ("XL/3R", 1, bf16, False, eager),
    ]
    for preset in ("XL/2R", "G/2R", "XL/3R", "demo"):
        groups["cuda"] += [(preset, batch, bf16, False, FORWARD_PROVIDERS) for batch in (1, 64)]
        groups["cuda"].append((preset, 32, bf16, True, PROVIDERS))
        if preset == "XL/2R":
            groups["cuda"].append((preset, 64, bf16, True, EAGER_PROVIDERS))
            groups["cuda"] += [(preset, batch, bf16, False, FP8_PROVIDERS) for batch in (64, 1)]
    # Never timed: on a CPU FP8 products are slow.
    groups["cpu"].append(("demo", 1, bf16, False, FP8_PROVIDERS))
    for device in DEVICES:
        for *settings, names in groups[device]:
            yield from (Row(device, *settings, name) for name in names)


@pytest.fixture(scope="module", autouse=True)
def _memory() -> None:
    """Keep freed memory for reuse, alike for every provider."""
    keep_freed_memory()


@pytest.mark.parametrize("row", [pytest.param(row, id=row.label) for row in rows()])
def test_model(benchmark: BenchmarkFixture, row: Row) -> None:
    if row.provider in FP8_PROVIDERS:
        skip_unusable_fp8(row, timed=not benchmark.disabled)
    measure_or_skip(benchmark, dataclasses.replace(row, shallow=benchmark.disabled))


def measure_or_skip(
    benchmark: BenchmarkFixture,
    row: Row,
    measure: Callable[[BenchmarkFixture, Row], None] | None = None,
) -> None:
    """Measure a row; skip it, with all of its memory released, if it does not fit the device."""
    try:
        (measure or measure_row)(benchmark, row)
    except torch.OutOfMemoryError as error:
        reason = f"{OUT_OF_MEMORY}: {error}".split("\n")[0]
    else:
        return
    # Outside the handler, where the exception no longer keeps the row's tensors alive.
    release_memory()
    pytest.skip(reason)


def skip_unusable_fp8(row: Row, timed: bool) -> None:
    """Skip an FP8 row, with the reason, if it cannot run, or would be timed on a CPU."""
    reason = why_not_fp8(torch.device(row.device))
    if reason is None and row.provider == TORCHAO_FP8:
        if importlib.util.find_spec("torchao") is None:
            reason = "torchao is not installed"
        elif row.device == "cpu":
            reason = "torchao quantises to FP8 on a GPU only"
    if reason is None and timed and row.device == "cpu":
        reason = "FP8 products on a CPU are for tests"
    if reason is not None:
        pytest.skip(f"{row.provider}: {reason}")


def release_memory() -> None:
    """Release the GPU memory of a row for the next one."""
    torch.compiler.reset()
    _cached_model.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_row(benchmark: BenchmarkFixture, row: Row) -> None:
    """Compare a row with the reference, then time it; on a GPU measure its peak memory too."""
    inputs = draw_inputs(row)
    expected = expected_tensors(dataclasses.replace(row, provider=""))
    gc.collect()
    before = torch.cuda.memory_allocated() if row.device == "cuda" else 0
    run, model = build_provider(row)
    # The published execution rounds in another order, int8 to fewer digits; a wrong result differs
    # by far more.
    times = 10 if row.provider == OURS_INT8 else 4 if row.provider.startswith(PUBLISHED) else 2
    if row.provider in FP8_PROVIDERS:
        times *= 16  # a rounding step of e4m3 in steps of bfloat16
    for actual, *others in zip(tensors_to_check(row, run, model, inputs), *expected, strict=True):
        check_close(actual.cpu(), *others, times=times)
    call = (
        training_call(row, run, model, inputs)
        if row.training
        else partial(forward, row, run, inputs)
    )
    del model  # a sampler keeps the optimised model only
    benchmark.extra_info |= row_facts(row, inputs["x"])
    benchmark.pedantic(synchronised(row, call), rounds=rounds(row, call), warmup_rounds=1)
    if row.device == "cuda":
        # The peak so far includes compiling and checking.
        torch.cuda.reset_peak_memory_stats()
        call()
        benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated() - before


def build_provider(row: Row) -> tuple[Run, DiMR]:
    """Return a provider with the interface of `DiMR`, and the model whose parameters it trains."""
    # A copy: training changes the weights, and on a GPU the provider's own memory is measured.
    model = base_model(row)
    if row.training or row.device == "cuda":
        model = copy.deepcopy(model)
    if row.provider == PUBLISHED:
        return PublishedDiMR.of(model), model
    if row.provider == PUBLISHED_NO_CHECKPOINTING:
        return PublishedDiMR.of(model, checkpointing=False), model
    if row.provider == PUBLISHED_COMPILED:
        return compiled(row, PublishedDiMR.of(model, checkpointing=False)), model
    if row.provider == REFERENCE_COMPILED:
        if not row.training:
            model = copy.deepcopy(model).to(row.dtype)
        return compiled(row, model.set_implementation("reference")), model
    if row.provider == TORCHAO_FP8:
        return compiled(row, quantized_by_torchao(PublishedDiMR.of(model, False))), model
    if row.training:
        return model, model
    quantize = QUANTIZED.get(row.provider)
    return optimize_for_inference(model, row.dtype, quantize=quantize), model


def quantized_by_torchao(model: torch.nn.Module) -> torch.nn.Module:
    """Quantise all linear layers of a copy of `model` as `quantize="fp8"` does, by row."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
        quantize_,
    )

    model = copy.deepcopy(model).to(torch.bfloat16)
    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return model


def compiled(row: Row, model: torch.nn.Module) -> Run:
    """Return `torch.compile` of a model, with CUDA graphs or frozen weights for a sampler."""
    torch.compiler.reset()
    graphs = row.device == "cuda" and not row.training and not row.shallow
    freezes = row.device == "cpu" and not row.training and not row.shallow
    return torch.compile(
        model,
        fullgraph=True,
        dynamic=False,
        backend="aot_eager" if row.shallow else "inductor",
        mode="reduce-overhead" if graphs else None,
        options={"freezing": True} if freezes else None,
    )


@lru_cache(maxsize=1)
def _cached_model(config: DiMRConfig, device: str) -> DiMR:
    """Return a model of random weights, the last one requested from a cache."""
    torch.manual_seed(0)
    with torch.device(device):
        model = DiMR(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # As initialised, outputs do not depend on time.
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def base_model(row: Row) -> DiMR:
    """Return the fp32 model whose weights every provider of a preset uses."""
    return _cached_model(row.config, row.device)


def draw_inputs(row: Row) -> dict[str, Tensor]:
    """Return x, times, classes and noise of a batch; images share one time except in training."""
    config, generator = row.config, torch.Generator().manual_seed(0)
    shape = row.batch, config.channels, *config.image_size
    times = row.batch if row.training else 1
    drawn = {
        # Rounded to the row's dtype first, so that reference and provider get the same numbers.
        "x": torch.randn(shape, generator=generator).to(row.dtype),
        "log_snr": 8 * torch.rand(times, generator=generator) - 4,
        "y": torch.randint(config.num_classes, (row.batch,), generator=generator),
        "noise": torch.randn(shape, generator=generator),
    }
    if row.training:
        drawn["x"] = drawn["x"].float()
    return {key: value.to(row.device) for key, value in drawn.items()}


def forward(row: Row, run: Run, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return the predictions, computed without gradients."""
    published = row.provider.startswith((PUBLISHED, TORCHAO_FP8))
    with torch.no_grad(), row.autocast(published):
        return run(inputs["x"], log_snr=inputs["log_snr"], y=inputs["y"])


def losses(row: Row, run: Run, inputs: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return the predictions, and the loss of each image."""
    with row.autocast():
        predictions = run(inputs["x"], log_snr=inputs["log_snr"], y=inputs["y"])
    return predictions, multi_scale_loss(predictions, inputs["noise"])


def training_call(
    row: Row, run: Run, model: DiMR, inputs: dict[str, Tensor]
) -> Callable[[], object]:
    """Return a training step with the published settings of AdamW, in one fused update."""
    optimizer = adamw(model, 2e-4)

    def step() -> None:
        optimizer.zero_grad()
        losses(row, run, inputs)[1].mean().backward()
        optimizer.step()

    return step


def tensors_to_check(row: Row, run: Run, model: DiMR, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return the tensors to check: predictions and, in training, all gradients as one vector."""
    if not row.training:
        return [p[:CHECKED] for p in forward(row, run, inputs)]
    predictions, loss = losses(row, run, inputs)
    loss[:CHECKED].mean().backward()
    return [*(p[:CHECKED].detach() for p in predictions), _gradient(list(model.parameters()))]


@lru_cache(maxsize=1)
def expected_tensors(row: Row) -> tuple[list[Tensor], list[Tensor]]:
    """Return the reference's tensors to check in the row's dtype and in a wider one, on the CPU."""
    inputs = {k: v if len(v) == 1 else v[:CHECKED] for k, v in draw_inputs(row).items()}
    exact = torch.float64 if row.dtype == torch.float32 else torch.float32
    more = {k: v.to(exact) if v.is_floating_point() else v for k, v in inputs.items()}
    wide = dataclasses.replace(row, dtype=torch.float32)  # not under autocast
    weights = torch.float32 if row.training else row.dtype
    return _reference(row, weights, inputs), [t.double() for t in _reference(wide, exact, more)]


def _reference(row: Row, weights: torch.dtype, inputs: dict[str, Tensor]) -> list[Tensor]:
    model = copy.deepcopy(base_model(row)).to(weights).set_implementation("reference")
    return [t.cpu() for t in tensors_to_check(row, model, model, inputs)]


def _gradient(parameters: list[Tensor]) -> Tensor:
    """Return all gradients as one vector, and clear them."""
    missing = [p for p in parameters if p.grad is None]
    assert not missing, f"{len(missing)} parameters have no gradient"
    vector = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return vector


def row_facts(row: Row, x: Tensor) -> dict[str, Any]:
    """Return a row's facts for the results file: work per call, and the machine's present rates."""
    counted = work(row.config)
    flops = counted.flops + (backward_flops(row.config) if row.training else 0)
    described = describe("model", row.provider, x) | {
        "preset": row.preset,
        "batch": row.batch,
        "pass": row.title,
        "dtype": dtype_name(row.dtype),
        "flops": row.batch * flops,
    }
    if not row.training:
        described["bytes"] = round(row.batch * counted.bytes(row.batch, row.dtype.itemsize))
    return described | linear_rate(row) | copy_rate(row)


def linear_rate(row: Row) -> dict[str, float]:
    """Return the TFLOP/s of `F.linear` at the faster product of the lowest branch's MLP."""
    branch = row.config.stage_configs[0]
    tokens = row.batch * branch.max_height * branch.max_width
    widths = branch.dim, branch.hidden_dim
    rates = []
    for inner, outer in itertools.permutations(widths):
        x = torch.randn(tokens, inner, device=row.device, dtype=row.dtype)
        weight = torch.randn(outer, inner, device=row.device, dtype=row.dtype)
        times = _short(row, lambda x=x, weight=weight: F.linear(x, weight))  # type: ignore[misc]
        rates.append([2e-12 * tokens * inner * outer / t for t in times])
    return Spread.of(max(rates, key=statistics.median)).named("gemm_tflops")


def copy_rate(row: Row) -> dict[str, float]:
    """Return the GB/s, read and written, of a copy larger than the caches."""
    source = torch.ones(2 ** (28 if row.device == "cuda" else 25), device=row.device)
    target = torch.empty_like(source)
    times = _short(row, lambda: target.copy_(source))
    return Spread.of([2e-9 * source.nbytes / t for t in times]).named("copy_gbps")


def _short(row: Row, call: Callable[[], object]) -> list[float]:
    """Return seconds per short call; on a GPU 20 calls are timed together to hide launches."""
    return _times(row, call, seconds=0.1, calls=20) if row.device == "cuda" else _times(row, call)


def _times(
    row: Row, call: Callable[[], object], seconds: float = 0.3, calls: int = 1
) -> list[float]:
    """Return seconds per call of rounds of `calls`: as many as fit, two if the row is shallow."""
    run = synchronised(row, lambda: [call() for _ in range(calls)])
    run()
    found: list[float] = []
    end = time.perf_counter() + (0 if row.shallow else seconds)
    while len(found) < 2 or time.perf_counter() < end:
        begun = time.perf_counter()
        run()
        found.append((time.perf_counter() - begun) / calls)
    return found


def rounds(row: Row, call: Callable[[], object]) -> int:
    """Return how many rounds fit the time per row, from the time of a single call."""
    if row.shallow:
        return 1
    took = min(_times(row, call, seconds=0))
    return min(max(round(SECONDS[row.device] / took), MIN_ROUNDS), MAX_ROUNDS)


def synchronised(row: Row, call: Callable[[], object]) -> Callable[[], None]:
    """Return a call that waits for the GPU."""

    def run() -> None:
        call()
        if row.device == "cuda":
            torch.cuda.synchronize()

    return run
