"""CUDA graphs of a function, captured at the first call with each input shape."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

GRAPHS = 8
"""The number of graphs that are kept; a new one replaces the least recently used."""

Compute = Callable[..., list[Tensor]]
Capture = Callable[[Compute, Sequence[Tensor], Any], Compute]
"""A function of a computation, its inputs and a memory pool, as CUDA graphs use it.

It returns a function that replays the computation on new inputs of the same shapes and dtypes.
"""


class CUDAGraphs:
    """CUDA graphs of one function, one for each combination of a flag, input shapes and dtypes.

    `function(flag, *inputs)` returns tensors. Calling an instance captures or replays it.
    """

    def __init__(self, function: Compute, capture: Capture) -> None:
        self._function = function
        self._capture = capture
        self._replays: dict[tuple[Any, ...], Compute] = {}
        # Graphs never run at the same time, so they can share memory.
        self._pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the captured graphs."""
        return CUDAGraphs, (self._function, self._capture)

    def __call__(self, flag: bool, *inputs: Tensor) -> list[Tensor]:
        key = flag, *((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        replay = self._replays.pop(key, None)
        if replay is None:
            if len(self._replays) == GRAPHS:
                del self._replays[next(iter(self._replays))]
            replay = self._capture(partial(self._function, flag), inputs, self._pool)
        self._replays[key] = replay  # the most recently used is last
        return replay(*inputs)


def capture_graph(function: Compute, inputs: Sequence[Tensor], pool: Any) -> Compute:
    """Capture `function(*inputs)` as a CUDA graph; return a function that replays it."""
    static = [tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs]
    with torch.cuda.device(static[0].device):
        # Warm up before the capture: it does not allow compiling kernels or initialising libraries.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function(*static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may call CUDA during the capture; a data loader pins memory.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = function(*static)

    def replay(*inputs: Tensor) -> list[Tensor]:
        for place, tensor in zip(static, inputs, strict=True):
            place.copy_(tensor)
        graph.replay()
        return [output.clone() for output in outputs]

    return replay
