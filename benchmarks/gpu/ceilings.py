"""Measure a GPU's ceilings, and how fast libraries are at the model's shapes.

This is section `measure` of the GPU report. Each call rotates through sets of random inputs several
times as large as the L2 cache; a CUDA graph of all calls is replayed and timed with events. On a
CPU, in a dry run, calls are timed one by one. A measurement that fails states its reason.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import nvidia_smi
from benchmarks.gpu.section_run import SectionRun, rates, times
from benchmarks.utils.names import BF16, FORWARD, FORWARD_AND_BACKWARD, PUBLISHED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIN_ROUNDS, MAX_ROUNDS = 5, 30
SECONDS = 0.7
"""Limit on timing a row once it has MIN_ROUNDS."""
FIELDS_UNDER_LOAD = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
"""Fields that nvidia-smi is asked for while the GPU multiplies matrices."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Measurement:
    """A row of a table; `prepare` draws inputs and returns a call on them.

    `bytes` are at least read and written per call, or 0 if a call exceeds the cache by far. If not
    `graph`, calls are launched one by one. `facts` are further columns of the row.
    """

    table: str
    case: str
    prepare: Callable[[], Call]
    bytes: int = 0
    flops: int = 0
    graph: bool = True
    facts: Mapping[str, str] = field(default_factory=dict)


def draw(*shape: int) -> Tensor:
    """Return standard normal numbers in bfloat16."""
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def ceilings(small: bool) -> Iterator[Measurement]:
    """Yield a copy, counted in both directions, and a square matrix product."""
    n = 2**16 if small else 2**29

    def copy() -> Call:
        x, y = draw(n), torch.empty(n, device=DEVICE, dtype=torch.bfloat16)
        return lambda: y.copy_(x)

    yield Measurement("ceilings", "copy", copy, bytes=4 * n)
    side = 64 if small else 8192
    yield linear("ceilings", side, side, side)


def products(small: bool) -> Iterator[Measurement]:
    """Yield the linear layers of the transformer and of the convolutional branch at batch 64."""
    sizes = [(16448, n, k) for k in (960, 1920) for n in (960, 2880, 3840)]
    sizes += [(65536, n, k) for k in (480, 960) for n in (480, 1920)]
    for m, n, k in [(8, 24, 16)] if small else sizes:
        yield linear("products", m, n, k)


def linear(table: str, m: int, n: int, k: int) -> Measurement:
    """Return the measurement of a linear layer: [M, K] times [K, N]."""

    def prepare() -> Call:
        x, weight = draw(m, k), draw(n, k)
        return lambda: F.linear(x, weight)

    case = f"M={m} N={n} K={k}"
    return Measurement(table, case, prepare, bytes=2 * (m * k + n * k + m * n), flops=2 * m * n * k)


def convolutions(small: bool) -> Iterator[Measurement]:
    """Yield torch's depthwise 7×7 on NHWC: forward and both gradients, without and with search."""
    shapes = [(1, 8, 8, 16)] if small else [(64, 32, 32, 480), (64, 64, 64, 240)]
    for search in (False, True):
        for shape in shapes:
            for name in ("forward", "input gradient", "weight gradient"):
                size = math.prod(shape)
                yield Measurement(
                    "depthwise 7×7, NHWC",
                    f"{'×'.join(map(str, shape))} {name}{', cudnn.benchmark' if search else ''}",
                    lambda shape=shape, name=name, search=search: convolution(shape, name, search),
                    bytes=4 * size,
                    flops=2 * 49 * size,
                )


def convolution(shape: tuple[int, ...], name: str, search: bool) -> Call:
    """Return a pass of the depthwise convolution; `search` sets cudnn.benchmark."""
    d = shape[-1]
    x, dy = (draw(*shape).permute(0, 3, 1, 2) for _ in range(2))
    weight, bias = draw(d, 1, 7, 7), draw(d)

    def run() -> Any:
        with torch.backends.cudnn.flags(enabled=True, benchmark=search):
            if name == "forward":
                return F.conv2d(x, weight, bias, padding=3, groups=d)
            wanted = [name == "input gradient", name == "weight gradient", False]
            return torch.ops.aten.convolution_backward(
                dy, x, weight, [d], [1, 1], [3, 3], [1, 1], False, [0, 0], d, wanted
            )

    return run


def attentions(small: bool) -> Iterator[Measurement]:
    """Yield SDPA's backends on views of packed q, k and v, and attention with casts as published.

    The head dimensions are that of XL/2R and the next multiple of 16.
    """
    batch, tokens, heads = (1, 5, 2) if small else (64, 257, 16)
    names = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH", PUBLISHED)
    for head_dim, name, backward in itertools.product((60, 64), names, (False, True)):
        shape = (batch, tokens, 3 * heads * head_dim)
        size = batch * tokens * heads * head_dim
        title = FORWARD_AND_BACKWARD if backward else FORWARD
        yield Measurement(
            "SDPA",
            f"head_dim={head_dim} {title}",
            lambda s=shape, n=name, b=backward: attention(s, heads, n, b),
            bytes=(12 if backward else 4) * 2 * size,
            flops=(14 if backward else 4) * size * tokens,
            facts={
                "backend": name.removesuffix("_ATTENTION").lower(),
                "x": "×".join(map(str, shape)),
                "pass": title,
                "dtype": BF16,
            },
        )


def attention(shape: tuple[int, ...], heads: int, name: str, backward: bool) -> Call:
    """Return a call of attention by an SDPA backend, or as published."""
    qkv = draw(*shape).requires_grad_(backward)
    gradient = draw(*shape[:2], shape[2] // 3)

    def by_backend() -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(SDPBackend.__members__[name]):
            return F.scaled_dot_product_attention(q, k, v)

    def as_published() -> Tensor:
        packed = qkv.unflatten(-1, (3 * heads, -1))
        q, k, v = packed.permute(0, 2, 1, 3).float().chunk(3, dim=1)
        return F.scaled_dot_product_attention(q, k, v)

    attend = as_published if name == PUBLISHED else by_backend

    def run() -> Any:
        y = attend().transpose(1, 2).reshape(gradient.shape).bfloat16()
        return torch.autograd.grad(y, qkv, gradient) if backward else y

    return run


def published(small: bool) -> Iterator[Measurement]:
    """Yield the published execution, sampling under bf16 autocast, launched from Python."""
    from benchmarks.model.flops import flops
    from dimr_fast.config import preset

    name = "tiny" if small else "DiMR-XL/2R"
    for batch in (1, 2) if small else (1, 64):
        yield Measurement(
            "published eager",
            f"{name} batch {batch}",
            lambda batch=batch: published_forward(name, batch),
            flops=batch * flops(preset(name)),
            graph=False,
        )


def published_forward(name: str, batch: int) -> Call:
    """Return a forward pass of a preset by the published execution."""
    from benchmarks.model.published import PublishedDiMR
    from dimr_fast import DiMR

    with DEVICE:
        ours = DiMR.from_preset(name)
    config, model = ours.config, PublishedDiMR.of(ours).eval()
    x = torch.randn(batch, config.channels, *config.image_size, device=DEVICE)
    log_snr = torch.full((batch,), 2.0, device=DEVICE)
    y = torch.randint(config.num_classes, (batch,), device=DEVICE)

    def run() -> Any:
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
            return model(x, log_snr=log_snr, y=y)

    return run


GROUPS = (ceilings, published, products, attentions, convolutions)
"""In order of importance."""


def measure_all(section: SectionRun) -> None:
    """Take every measurement for which there is time."""
    for group in GROUPS:
        try:
            for measurement in group(section.dry_run):
                title = f"{measurement.table}: {measurement.case}"
                if section.seconds_left() < 0:
                    section.cut_short(f"No time was left for {title}")
                    return
                print(title, flush=True)
                section.add_rows(measurement.table, [measure(measurement)])
        except Exception as error:
            section.fail(f"{group.__name__}: {type(error).__name__}: {error}")
        if group is ceilings:
            _add_load_facts(section)


def measure(measurement: Measurement) -> dict[str, Any]:
    """Return the row of a measurement: its times and rates, or the reason why there are none."""
    row = {"case": measurement.case, **measurement.facts}
    on_gpu = DEVICE.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
    try:
        calls = [measurement.prepare() for _ in range(_sets(measurement.bytes))]
        timed = _graph_times if measurement.graph and on_gpu else _call_times
        found = times(list(timed(calls)))
    except Exception as error:
        # A library that does not support the case is a result.
        reason = str(error).strip().split("\n")[0][:160]
        return row | {"reason": f"{type(error).__name__}: {reason}"}
    return row | found | rates(found["median ms"], measurement.bytes, measurement.flops)


def _sets(size: int) -> int:
    """Return how many sets of inputs are together four times as large as the L2 cache."""
    if DEVICE.type != "cuda" or not size:
        return 1
    return math.ceil(4 * torch.cuda.get_device_properties(DEVICE).L2_cache_size / size)


def _graph_times(calls: Sequence[Call]) -> Iterator[float]:
    """Yield milliseconds per call, one value for each replay of a graph of all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    for elapsed in _call_times([graph.replay]):
        yield elapsed / len(calls)


def _call_times(calls: Sequence[Call]) -> Iterator[float]:
    """Yield milliseconds per call, going through the calls in turn."""
    for call in calls:
        call()
    end = time.monotonic() + SECONDS
    for count, call in enumerate(itertools.cycle(calls)):
        if count == MAX_ROUNDS or (count >= MIN_ROUNDS and time.monotonic() > end):
            return
        if DEVICE.type != "cuda":
            start = time.perf_counter()
            call()
            yield 1e3 * (time.perf_counter() - start)
            continue
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        yield before.elapsed_time(after)


def _add_load_facts(section: SectionRun) -> None:
    """State clocks and power of the GPU while it multiplies matrices."""
    if DEVICE.type != "cuda":
        section.note("No clocks or power under load: there is no GPU.")
        return
    x, y = draw(8192, 8192), draw(8192, 8192)

    def multiply() -> None:
        for _ in range(20):
            torch.mm(x, y)
        torch.cuda.synchronize()

    end = time.monotonic() + 1
    while time.monotonic() < end:
        multiply()
    for name, value in nvidia_smi.query(FIELDS_UNDER_LOAD, meanwhile=multiply).items():
        section.add_fact(f"{name} under load", value)
