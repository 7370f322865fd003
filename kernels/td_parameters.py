"""The values of all time-dependent parameters of a model: many small vectors, one launch.

    e = (w + 1)·τ + b        s = sigmoid(e)        value = p1 + s · (p0 − p1)

and backward, where g is the gradient of the value and sums are over the times:

    dp0 = Σ g·s        dp1 = Σ g·(1 − s)
    db = (p0 − p1) · Σ g·s·(1 − s)        dw = (p0 − p1) · Σ g·s·(1 − s)·τ

The vectors are separate tensors. A table of their addresses, on the device, gives each program its
columns of one parameter; the results of all parameters are adjacent columns of one tensor. Forward
writes four bytes per value, backward reads them; the vectors are read once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from dimr_fast.kernels.configuration import configuration

Vectors = Sequence[torch.Tensor]


def launch_fwd(
    tau: torch.Tensor, param0: Vectors, param1: Vectors, weight: Vectors, bias: Vectors
) -> torch.Tensor:
    """Return the values `[T, ΣD]` at times `tau` `[T]` of parameters, given as lists of `[D]`."""
    columns = sum(v.shape[0] for v in param0)
    dtype = torch.promote_types(tau.dtype, param0[0].dtype)
    values = torch.empty(tau.shape[0], columns, dtype=dtype, device=tau.device)
    if values.numel() == 0:
        return values
    constants = configuration("td_parameters_fwd", tau.shape[0], tau.device)
    vectors = [[v.contiguous() for v in kind] for kind in (param0, param1, weight, bias)]
    table, aligned = TABLES.of(vectors, constants["BLOCK"])
    _td_parameters_fwd_kernel[(table.shape[0],)](
        table,
        vectors[0][0],
        tau.contiguous(),
        values,
        tau.shape[0],
        columns,
        ALIGNED=aligned,
        **constants,
    )
    return values


def launch_bwd(
    dvalues: torch.Tensor,
    tau: torch.Tensor,
    param0: Vectors,
    param1: Vectors,
    weight: Vectors,
    bias: Vectors,
) -> torch.Tensor:
    """Return the gradients `[4, ΣD]` of the four vectors of all parameters."""
    columns = sum(v.shape[0] for v in param0)
    grads = torch.empty(4, columns, dtype=param0[0].dtype, device=tau.device)
    if grads.numel() == 0:
        return grads
    constants = configuration("td_parameters_bwd", tau.shape[0], tau.device)
    vectors = [[v.contiguous() for v in kind] for kind in (param0, param1, weight, bias)]
    table, aligned = TABLES.of(vectors, constants["BLOCK"])
    dvalues = dvalues if dvalues.stride(-1) == 1 else dvalues.contiguous()
    _td_parameters_bwd_kernel[(table.shape[0],)](
        table,
        vectors[0][0],
        tau.contiguous(),
        dvalues,
        grads,
        tau.shape[0],
        columns,
        dvalues.stride(0),
        ALIGNED=aligned,
        **constants,
    )
    return grads


def build_table(
    device: torch.device,
    addresses: tuple[tuple[int, ...], ...],
    widths: tuple[int, ...],
    itemsize: int,
    block: int,
) -> torch.Tensor:
    """Return a table with one row per block of columns.

    A row has four addresses, the first column in the results and the number of columns. The copy to
    the device is synchronous, because a later call may be on another stream. A CUDA graph's
    warm-up therefore has to build the table; capturing a graph that needs a new one fails.
    """
    rows = []
    place = 0
    for width, *starts in zip(widths, *addresses, strict=True):
        for column in range(0, width, block):
            here = [start + column * itemsize for start in starts]
            rows.append([*here, place + column, min(block, width - column)])
        place += width
    return torch.tensor(rows, dtype=torch.int64, device=device)


class Tables:
    """Tables of addresses on the device, for the tensors that were used most recently.

    A table is a few kilobytes. `build` makes one. A new table replaces the least recently used of
    `limit`. The limit is larger than the number that the warm-up of any CUDA graph uses, because
    the tables built by the warm-up must still exist when the graph is captured.
    """

    def __init__(self, build: Callable[..., torch.Tensor] = build_table, limit: int = 256) -> None:
        self.limit = limit
        self.kept: dict[tuple[Any, ...], torch.Tensor] = {}
        """From the least to the most recently used."""
        self.captured: set[torch.Tensor] = set()
        """Tables that a CUDA graph reads at each replay, and does not keep alive itself."""
        self._build = build

    def of(self, vectors: Sequence[Vectors], block: int) -> tuple[torch.Tensor, bool]:
        """Return the table of `vectors`, and True if all of them are aligned for 16-byte loads.

        A table contains only addresses and its key lists them all, so a cached table is valid for
        any tensors with the same key.
        """
        first = vectors[0][0]
        addresses = tuple(tuple(v.data_ptr() for v in kind) for kind in vectors)
        widths = tuple(v.shape[0] for v in vectors[0])
        key = first.device, addresses, widths, first.element_size(), block
        table = self.kept.pop(key, None)
        if table is None:
            # Bounded: parameters that are cast for each call have new addresses each time.
            if len(self.kept) == self.limit:
                del self.kept[next(iter(self.kept))]
            table = self._build(*key)
        self.kept[key] = table
        if table.is_cuda and torch.cuda.is_current_stream_capturing():
            self.captured.add(table)
        aligned = all(width % 16 == 0 for width in widths) and all(
            address % 16 == 0 for kind in addresses for address in kind
        )
        return table, aligned


TABLES = Tables()
"""The tables of all launches in this process."""


@triton.jit
def _vector(table_ptr, vector_ptr, column, inside, ALIGNED: tl.constexpr):
    """Load columns, in fp32, of the vector whose address is at `table_ptr`."""
    pointer = tl.load(table_ptr).to(vector_ptr.dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return tl.load(pointer + column, inside, other=0.0).to(tl.float32)


@triton.jit
def _columns(table_ptr, vector_ptr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Return p0, p1, w and b of this program's columns, their place in the results, and a mask."""
    row_ptr = table_ptr + tl.program_id(0) * 6
    place = tl.load(row_ptr + 4)
    count = tl.load(row_ptr + 5)
    if ALIGNED:
        place = tl.multiple_of(place, 16)
        count = tl.multiple_of(count, 16)
    column = tl.arange(0, BLOCK)
    inside = column < count
    p0 = _vector(row_ptr, vector_ptr, column, inside, ALIGNED)
    p1 = _vector(row_ptr + 1, vector_ptr, column, inside, ALIGNED)
    weight = _vector(row_ptr + 2, vector_ptr, column, inside, ALIGNED)
    bias = _vector(row_ptr + 3, vector_ptr, column, inside, ALIGNED)
    return p0, p1, weight, bias, place + column, inside


@triton.jit
def _sigmoid(tau, weight, bias):
    """Return `s` `[TIMES, BLOCK]`; an exponential that overflows has the right reciprocal, 0."""
    e = (weight + 1.0)[None, :] * tau[:, None] + bias[None, :]
    return 1.0 / (1.0 + tl.exp(-e))


@triton.jit
def _td_parameters_fwd_kernel(
    table_ptr,  # [programs, 6] int64
    vector_ptr,  # not read: it gives the type of the table's addresses
    tau_ptr,  # [T]
    values_ptr,  # [T, columns], contiguous
    times,  # T
    columns,
    ALIGNED: tl.constexpr,
    TIMES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p0, p1, weight, bias, place, inside = _columns(table_ptr, vector_ptr, ALIGNED, BLOCK)
    for start in range(0, times, TIMES):
        time = start + tl.arange(0, TIMES)
        tau = tl.load(tau_ptr + time, time < times, other=0.0).to(tl.float32)
        s = _sigmoid(tau, weight, bias)
        value = p1[None, :] + s * (p0 - p1)[None, :]
        out = time[:, None].to(tl.int64) * columns + place[None, :]
        there = (time < times)[:, None] & inside[None, :]
        tl.store(values_ptr + out, value.to(values_ptr.dtype.element_ty), there)


@triton.jit
def _td_parameters_bwd_kernel(
    table_ptr,  # [programs, 6] int64
    vector_ptr,  # not read: it gives the type of the table's addresses
    tau_ptr,  # [T]
    dvalues_ptr,  # [T, columns]
    grads_ptr,  # [4, columns], contiguous
    times,  # T
    columns,
    dvalues_stride,  # from time to time
    ALIGNED: tl.constexpr,
    TIMES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p0, p1, weight, bias, place, inside = _columns(table_ptr, vector_ptr, ALIGNED, BLOCK)
    dp0 = tl.zeros([TIMES, BLOCK], tl.float32)
    dp1 = tl.zeros([TIMES, BLOCK], tl.float32)
    dweight = tl.zeros([TIMES, BLOCK], tl.float32)
    dbias = tl.zeros([TIMES, BLOCK], tl.float32)
    for start in range(0, times, TIMES):
        time = start + tl.arange(0, TIMES)
        tau = tl.load(tau_ptr + time, time < times, other=0.0).to(tl.float32)
        s = _sigmoid(tau, weight, bias)
        there = (time < times)[:, None] & inside[None, :]
        at = time[:, None].to(tl.int64) * dvalues_stride + place[None, :]
        g = tl.load(dvalues_ptr + at, there, other=0.0).to(tl.float32)
        dp0 += g * s
        dp1 += g * (1.0 - s)
        de = g * s * (1.0 - s)
        dbias += de
        dweight += de * tau[:, None]
    grads_ptr += place
    dtype = grads_ptr.dtype.element_ty
    tl.store(grads_ptr, tl.sum(dp0, 0).to(dtype), inside)
    tl.store(grads_ptr + columns, tl.sum(dp1, 0).to(dtype), inside)
    tl.store(grads_ptr + 2 * columns, ((p0 - p1) * tl.sum(dweight, 0)).to(dtype), inside)
    tl.store(grads_ptr + 3 * columns, ((p0 - p1) * tl.sum(dbias, 0)).to(dtype), inside)
