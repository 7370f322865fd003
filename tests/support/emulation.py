"""Run the launches of csrc/cuda/ on the host, under AddressSanitizer and UBSan."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tests.support.paths import ROOT

H100 = 132  # multiprocessors


class Launch(NamedTuple):
    """The blocks of a launch, the threads of a block and its bytes of shared memory."""

    blocks: int
    threads: int
    shared: int


class Unavailable(Exception):
    """Raised with the reason why the emulation cannot be compiled here."""


def build(folder: Path) -> Path:
    """Compile the emulation of csrc/cuda/depthwise_conv2d* in `folder`; return its path."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise Unavailable(f"no C++ compiler: {compiler}")
    here, output = ROOT / "tests" / "cuda_emulation", folder / "depthwise_conv2d"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    options = ["-std=c++20", "-O1", "-g1", *sanitizers, *warnings, "-I", here, "-I", ROOT / "csrc"]
    command = [compiler, *options, here / "depthwise_conv2d.cpp", "-o", output]
    result = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in result.stderr and "san" in result.stderr:
        raise Unavailable(f"{compiler} comes without its sanitizers")
    assert result.returncode == 0, result.stderr
    return output


class Emulation:
    """The operators' launches for a GPU with that many multiprocessors.

    `launches` are those of the last call. The weights begin `weight_offset` elements after a
    multiple of 16 bytes.
    """

    def __init__(self, program: Path, processors: int = H100, weight_offset: int = 0) -> None:
        self.program, self.processors, self.weight_offset = program, processors, weight_offset
        self.launches: list[Launch] = []

    def fwd(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> Tensor:
        """Return y; the arguments are those of the registered operator."""
        tensors = [_storage(x), self._shifted(weight), bias]
        (y,) = self._run("fwd", x, x, tensors, weight.shape[-1], bias is not None, residual)
        return _tensor(y, x.dtype, x.shape)

    def bwd(
        self, dy: Tensor, x: Tensor, weight: Tensor, residual: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dx, dweight and dbias."""
        tensors = [_storage(dy), _storage(x), self._shifted(weight)]
        dx, dweight, dbias = self._run("bwd", x, dy, tensors, weight.shape[-1], False, residual)
        return (
            _tensor(dx, x.dtype, x.shape),
            _tensor(dweight, torch.float32, weight.shape),
            _tensor(dbias, torch.float32, weight.shape[:1]),
        )

    def _shifted(self, weight: Tensor) -> Tensor:
        return torch.nn.functional.pad(weight.flatten(), (self.weight_offset, 0), value=torch.nan)

    def _run(
        self,
        operation: str,
        x: Tensor,
        dy: Tensor,
        tensors: list[Tensor | None],
        k: int,
        has_bias: bool,
        residual: bool,
    ) -> list[bytes]:
        numbers = [*x.shape, k, residual, has_bias, self.processors]
        for features in (x, dy):
            numbers += [features.storage_offset(), *features.stride()[:3]]
        numbers.append(self.weight_offset)
        dtype = str(x.dtype).removeprefix("torch.")
        result = subprocess.run(
            [self.program, operation, dtype, *(str(int(n)) for n in numbers)],
            input=b"".join(_framed(t) for t in tensors),
            capture_output=True,
            env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
        )
        report = result.stderr.decode()
        assert result.returncode == 0, report
        lines = [line.split() for line in report.splitlines() if line.startswith("launch ")]
        self.launches = [Launch(*map(int, numbers)) for _, *numbers in lines]
        outputs, data = [], result.stdout
        while data:
            size = int.from_bytes(data[:8], "little")
            outputs.append(data[8 : 8 + size])
            data = data[8 + size :]
        return outputs


def _storage(view: Tensor) -> Tensor:
    """Return all elements in memory from the start of the storage to the last one of the view."""
    if view.numel() == 0:
        return view
    last = sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))
    return torch.as_strided(view, (view.storage_offset() + last + 1,), (1,), 0)


def _framed(tensor: Tensor | None) -> bytes:
    if tensor is None:
        return bytes(8)
    data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return len(data).to_bytes(8, "little") + data


def _tensor(data: bytes, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return (
        torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape)
    )
