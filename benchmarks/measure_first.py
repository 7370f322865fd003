"""What to know of a GPU before optimising for it: its ceilings, libraries at the model's shapes.

The section `measure` of `gpu_report.py`. Each call goes through as many sets of random inputs as
exceed the L2 cache several times over, as one CUDA graph whose replays are timed with events; on a
CPU, in a dry run, calls are timed one by one. What does not run leaves its reason in its row.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from gpu_part import Part, nvidia_smi, rates, times
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 30
SECONDS = 0.7
"""Of timing for a row, at most, apart from one round."""
FEWEST = 5
"""Rounds, whatever time they take."""
PUBLISHED = "published"
LOADED = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
"""What nvidia-smi is asked while the GPU multiplies matrices."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Question:
    """A row of a table: `prepare` draws inputs and returns the call on them."""

    table: str
    what: str
    prepare: Callable[[], Call]
    bytes: int = 0
    """Read and written by a call, at least; 0 where it goes through far more than the cache."""
    flops: int = 0
    graph: bool = True
    """Whether the calls can be captured; otherwise they are launched one by one."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What else the row says."""


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def ceilings(small: bool) -> Iterator[Question]:
    """Copying, both ways counted, and a square product."""
    n = 2**16 if small else 2**29

    def copy() -> Call:
        x, y = draw(n), torch.empty(n, device=DEVICE, dtype=torch.bfloat16)
        return lambda: y.copy_(x)

    yield Question("ceilings", "copy", copy, bytes=4 * n)
    side = 64 if small else 8192
    yield linear("ceilings", side, side, side)


def products(small: bool) -> Iterator[Question]:
    """cuBLAS for the transformer's layers at batch 64, then for the convolutional branch's."""
    sizes = [(16448, n, k) for k in (960, 1920) for n in (960, 2880, 3840)]
    sizes += [(65536, n, k) for k in (480, 960) for n in (480, 1920)]
    for m, n, k in [(8, 24, 16)] if small else sizes:
        yield linear("products", m, n, k)


def linear(table: str, m: int, n: int, k: int) -> Question:
    def prepare() -> Call:
        x, weight = draw(m, k), draw(n, k)
        return lambda: F.linear(x, weight)

    what = f"M={m} N={n} K={k}"
    return Question(table, what, prepare, bytes=2 * (m * k + n * k + m * n), flops=2 * m * n * k)


def convolutions(small: bool) -> Iterator[Question]:
    """torch's depthwise 7×7 on NHWC: forward and both gradients, as found and as searched for."""
    shapes = [(1, 8, 8, 16)] if small else [(64, 32, 32, 480), (64, 64, 64, 240)]
    for search in (False, True):
        for shape in shapes:
            for name in ("forward", "input gradient", "weight gradient"):
                size = math.prod(shape)
                yield Question(
                    "depthwise 7×7, NHWC",
                    f"{'×'.join(map(str, shape))} {name}{', cudnn.benchmark' if search else ''}",
                    lambda shape=shape, name=name, search=search: convolution(shape, name, search),
                    bytes=4 * size,
                    flops=2 * 49 * size,
                )


def convolution(shape: tuple[int, ...], name: str, search: bool) -> Call:
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


def attentions(small: bool) -> Iterator[Question]:
    """SDPA's backends on views of packed q, k and v, and attention with its casts as published.

    At XL/2R's head_dim, and at the next that tiles.
    """
    batch, tokens, heads = (1, 5, 2) if small else (64, 257, 16)
    names = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH", PUBLISHED)
    for head_dim, name, backward in itertools.product((60, 64), names, (False, True)):
        shape = (batch, tokens, 3 * heads * head_dim)
        size = batch * tokens * heads * head_dim
        title = "forward + backward" if backward else "forward"
        yield Question(
            "SDPA",
            f"head_dim={head_dim} {title}",
            lambda s=shape, n=name, b=backward: attention(s, heads, n, b),
            bytes=(12 if backward else 4) * 2 * size,
            flops=(14 if backward else 4) * size * tokens,
            facts={
                "backend": name.removesuffix("_ATTENTION").lower(),
                "x": "×".join(map(str, shape)),
                "pass": title,
                "dtype": "bfloat16",
            },
        )


def attention(shape: tuple[int, ...], heads: int, name: str, backward: bool) -> Call:
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

    mix = as_published if name == PUBLISHED else by_backend

    def run() -> Any:
        y = mix().transpose(1, 2).reshape(gradient.shape).bfloat16()
        return torch.autograd.grad(y, qkv, gradient) if backward else y

    return run


def published(small: bool) -> Iterator[Question]:
    """The published execution, sampling in bf16 autocast, launched from Python as published."""
    from flops import flops

    from dimr_fast.config import preset

    name = "tiny" if small else "DiMR-XL/2R"
    for batch in (1, 2) if small else (1, 64):
        yield Question(
            "published eager",
            f"{name} batch {batch}",
            lambda batch=batch: forward(name, batch),
            flops=batch * flops(preset(name)),
            graph=False,
        )


def forward(name: str, batch: int) -> Call:
    from baseline import PublishedDiMR

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


QUESTIONS = (ceilings, published, products, attentions, convolutions)
"""In order of importance."""


def measure_all(part: Part) -> None:
    """Answer every question for which there is time."""
    for questions in QUESTIONS:
        try:
            for question in questions(part.dry_run):
                if part.left() < 0:
                    part.cut_short(f"No time was left for {question.table}: {question.what}")
                    return
                print(f"{question.table}: {question.what}", flush=True)
                part.rows(question.table, [answer(question)])
        except Exception as error:
            part.fail(f"{questions.__name__}: {type(error).__name__}: {error}")
        if questions is ceilings:
            _under_load(part)


def answer(question: Question) -> dict[str, Any]:
    """A question's row: its times and rates, or why there are none."""
    row = {"what": question.what, **question.facts}
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    try:
        calls = [question.prepare() for _ in range(_sets(question.bytes))]
        found = times(list(_graph_times(calls) if _graphs(question) else _call_times(calls)))
    except Exception as error:
        # A library without an answer is an answer.
        reason = str(error).strip().split("\n")[0][:160]
        return row | {"reason": f"{type(error).__name__}: {reason}"}
    return row | found | rates(found["median ms"], question.bytes, question.flops)


def _graphs(question: Question) -> bool:
    return question.graph and DEVICE.type == "cuda"


def _sets(size: int) -> int:
    """Sets of inputs that together are several times what the L2 cache holds."""
    if DEVICE.type != "cuda" or not size:
        return 1
    return math.ceil(4 * torch.cuda.get_device_properties(DEVICE).L2_cache_size / size)


def _graph_times(calls: Sequence[Call]) -> Iterator[float]:
    """Milliseconds of a call, in each of the replays of all of them."""
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
    """Milliseconds of a call: each once, and again until there are enough."""
    for call in calls:
        call()
    end = time.monotonic() + SECONDS
    for count, call in enumerate(itertools.cycle(calls)):
        if count == ROUNDS or (count >= FEWEST and time.monotonic() > end):
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


def _under_load(part: Part) -> None:
    """Clocks and power while matrices are multiplied."""
    if DEVICE.type != "cuda":
        part.note("No clocks or power under load: there is no GPU.")
        return
    x, y = draw(8192, 8192), draw(8192, 8192)

    def busy() -> None:
        for _ in range(20):
            torch.mm(x, y)
        torch.cuda.synchronize()

    end = time.monotonic() + 1
    while time.monotonic() < end:
        busy()
    for name, value in nvidia_smi(LOADED, meanwhile=busy).items():
        part.fact(f"{name} under load", value)
