"""What to know of a GPU before optimising for it: its ceilings, and libraries at the model's shapes.

The section `measure` of `gpu_report.py`. Each call goes through as many sets of random inputs as
exceed the L2 cache several times over, as one CUDA graph whose replays are timed with events; on a
CPU, in a dry run, calls are timed one by one. What does not run leaves its reason in its row.
"""

import math
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu_part import Part, rates, times
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 30
SECONDS = 0.7
"""Of timing for a row, at most, apart from one round."""
GMAC = 160
"""Of an image through DiMR-XL/2R, by the paper's and this repository's count."""
LOADED = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
"""What nvidia-smi is asked while the GPU multiplies matrices."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Question:
    """A row of a table: `prepare` draws inputs and returns the call on them."""

    table: str
    what: str
    prepare: Callable[[], Call]
    bytes: int
    """Read and written by a call, at least."""
    flops: int = 0
    graph: bool = True
    """Whether the calls can be captured; otherwise they are launched one by one."""


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
    """SDPA's backends on views of packed q, k and v, at XL's head_dim and at the next that tiles."""
    batch, tokens, heads = (1, 5, 2) if small else (64, 257, 16)
    backends = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    for head_dim in (60, 64):
        size = batch * tokens * heads * head_dim
        for backend in backends:
            for backward in (False, True):
                shape = (batch, tokens, 3, heads, head_dim)
                yield Question(
                    "SDPA",
                    f"B={batch} N={tokens} heads={heads} head_dim={head_dim} "
                    f"{backend} {'forward + backward' if backward else 'forward'}",
                    lambda s=shape, name=backend, b=backward: attention(s, name, b),
                    bytes=(12 if backward else 4) * 2 * size,
                    flops=(14 if backward else 4) * size * tokens,
                )


def attention(shape: tuple[int, ...], backend: str, backward: bool) -> Call:
    qkv = draw(*shape).requires_grad_(backward)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    gradient = draw(*q.shape)

    def run() -> Any:
        with sdpa_kernel(SDPBackend.__members__[backend]):
            y = F.scaled_dot_product_attention(q, k, v)
        # The graph of the views stays; that of the call is new each time.
        return torch.autograd.grad(y, qkv, gradient, retain_graph=True) if backward else y

    return run


def published(small: bool) -> Iterator[Question]:
    """The published execution, sampling in bf16 autocast, launched from Python as published."""
    preset = "tiny" if small else "DiMR-XL/2R"
    for batch in (1, 2) if small else (1, 64):
        yield Question(
            "published eager",
            f"{preset} batch {batch}",
            lambda batch=batch: forward(preset, batch),
            bytes=0,
            flops=0 if small else 2 * 10**9 * GMAC * batch,
            graph=False,
        )


def forward(preset: str, batch: int) -> Call:
    from baseline import PublishedDiMR

    from dimr_fast import DiMR

    with DEVICE:
        model = PublishedDiMR.of(DiMR.from_preset(preset)).eval()
        config = DiMR.from_preset("tiny").config if preset == "tiny" else None
    return model, config
