"""The CUDA kernels of `depthwise_conv2d`: emulated on the host, as compiled, and on a GPU."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import assert_as_accurate

from dimr_fast import reference

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
H100 = 132  # multiprocessors


def reference_fwd(x, weight, bias, residual):
    y = reference.depthwise_conv2d(x, weight, bias)
    return y + x if residual else y


def reference_bwd(dy, x, weight, residual):
    """dx, dweight and dbias."""
    bias = weight.new_zeros(weight.shape[0])
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    return torch.autograd.grad(reference_fwd(*leaves, residual), leaves, dy)


class Emulation:
    """The launches of csrc/cuda/, run on the host under the sanitizers."""

    def __init__(self, program, processors=H100):
        self.program, self.processors = program, processors

    def fwd(self, x, weight, bias, residual):
        (y,) = self._run("fwd", x, x, [_storage(x), weight, bias], weight, bias, residual)
        return _tensor(y, x.dtype, x.shape)

    def bwd(self, dy, x, weight, residual):
        inputs = [_storage(dy), _storage(x), weight]
        dx, dweight, dbias = self._run("bwd", x, dy, inputs, weight, None, residual)
        return (
            _tensor(dx, x.dtype, x.shape),
            _tensor(dweight, torch.float32, weight.shape),
            _tensor(dbias, torch.float32, weight.shape[:1]),
        )

    def _run(self, operation, x, dy, tensors, weight, bias, residual):
        numbers = [*x.shape, weight.shape[-1], residual, bias is not None, self.processors]
        for features in (x, dy):
            numbers += [features.storage_offset(), *features.stride()[:3]]
        dtype = str(x.dtype).removeprefix("torch.")
        arguments = [str(int(n)) for n in numbers]
        result = subprocess.run(
            [self.program, operation, dtype, *arguments],
            input=b"".join(_framed(t) for t in tensors),
            capture_output=True,
            env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
        )
        assert result.returncode == 0, result.stderr.decode()
        outputs, data = [], result.stdout
        while data:
            size = int.from_bytes(data[:8], "little")
            outputs.append(data[8 : 8 + size])
            data = data[8 + size :]
        return outputs


def _storage(view):
    """All that lies in memory from the view's storage's start to the view's last element."""
    last = sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))
    return torch.as_strided(view, (view.storage_offset() + last + 1,), (1,), 0)


def _framed(tensor):
    if tensor is None:
        return (0).to_bytes(8, "little")
    data = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return len(data).to_bytes(8, "little") + data


def _tensor(data, dtype, shape):
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(dtype).view(shape)


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler: {compiler}")
    here = Path(__file__).parent / "cuda_emulation"
    output = tmp_path_factory.mktemp("cuda_emulation") / "depthwise_conv2d"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    options = ["-std=c++20", "-O1", "-g1", *sanitizers, *warnings, "-I", here, "-I", ROOT / "csrc"]
    result = subprocess.run(
        [compiler, *options, here / "depthwise_conv2d.cpp", "-o", output],
        capture_output=True,
        text=True,
    )
    if "cannot find" in result.stderr and "san" in result.stderr:
        pytest.skip("the compiler comes without its sanitizers")
    assert result.returncode == 0, result.stderr
    return output


def contiguous(x):
    return x.contiguous()


def channels_of_wider(x, before=8, after=8):
    """The same values as a slice of the channels of a wider buffer that is NaN elsewhere."""
    b, h, w, d = x.shape
    wide = x.new_full((b, h, w, before + d + after), torch.nan)
    wide[..., before : before + d] = x
    return wide[..., before : before + d]


def unaligned_channels(x):
    return channels_of_wider(x, before=3, after=2)


def every_other_pixel(x):
    b, h, w, d = x.shape
    wide = x.new_full((b, 2 * h, 2 * w + 1, d), torch.nan)
    wide[:, ::2, 1::2] = x
    return wide[:, ::2, 1::2]


def columns_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


LAYOUTS = [
    contiguous,
    channels_of_wider,
    unaligned_channels,
    every_other_pixel,
    columns_first,
]


def make(b, h, w, d, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dy, x = (torch.randn(b, h, w, d, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(s, generator=generator) for s in ((d, 1, k, k), (d,)))
    return dy, x, weight, bias


def check(emulation, shape, dtype, layout=contiguous, residual=True, has_bias=True):
    dy, x, weight, bias = make(*shape)
    bias = bias if has_bias else None

    def fwd(x, weight, bias=None):
        return emulation.fwd(layout(x), weight, bias, residual)

    def fwd_reference(x, weight, bias=None):
        return reference_fwd(x, weight, bias, residual)

    assert_as_accurate(fwd, fwd_reference, x, weight, bias, dtype=dtype)

    found = []

    def input_gradient(dy, x, weight):
        found[:] = emulation.bwd(layout(dy), layout(x), weight, residual)
        return found[0]

    def input_gradient_reference(dy, x, weight):
        return reference_bwd(dy, x, weight, residual)[0]

    assert_as_accurate(input_gradient, input_gradient_reference, dy, x, weight, dtype=dtype)
    # The others are float32, so they are judged as float32 sums of the same, quantised, values.
    exact = [t.to(dtype).float() for t in (dy, x, weight)]
    assert_as_accurate(
        lambda *_: tuple(found[1:]),
        lambda *inputs: reference_bwd(*inputs, residual)[1:],
        *exact,
        dtype=torch.float32,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 5, 7, 9, 11, 13])
@pytest.mark.parametrize(("h", "w", "d"), [(1, 1, 1), (9, 13, 24), (4, 2, 17)])
def test_every_kernel_and_dtype(program, h, w, d, k, dtype):
    check(Emulation(program), (2, h, w, d, k), dtype)
