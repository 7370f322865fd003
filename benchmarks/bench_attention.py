"""Forward, and forward with backward, of `attention` at the presets' and the demo's shapes.

The two matrix products are 4·N²·D FLOP an image forward; packed q, k and v are read and the result
written once.
"""

import pytest
import torch
from harness import DEVICES, check_close, describe, name, usable
from pytest_benchmark.fixture import BenchmarkFixture

from dimr_fast.ops import OPERATORS, attention

# batch, tokens, heads, head_dim
SHAPES = [(32, 65, 4, 48), (4, 257, 16, 60), (4, 257, 16, 72)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("implementation", OPERATORS["attention"].names)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_attention(
    benchmark: BenchmarkFixture,
    backward: bool,
    implementation: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str,
) -> None:
    batch, tokens, heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(batch, tokens, 3 * heads * head_dim, generator=generator)
    qkv = exact.to(device, dtype).requires_grad_(backward)
    usable("attention", implementation, qkv)
    grad = torch.randn(batch, tokens, heads * head_dim, generator=generator).to(device, dtype)

    def call() -> torch.Tensor:
        out = attention(qkv, heads, implementation=implementation)
        if backward:
            out.backward(grad)
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    def reference(x: torch.Tensor) -> torch.Tensor:
        return attention(x.detach(), heads, implementation="reference")

    check_close(call(), reference(qkv), reference(qkv.double()))
    benchmark.extra_info |= describe("attention", implementation, qkv) | {
        "pass": "forward + backward" if backward else "forward",
        "heads": heads,
        "flops": 4 * batch * tokens**2 * heads * head_dim,
        "bytes": 4 * batch * tokens * heads * head_dim * qkv.element_size(),
    }
    benchmark.pedantic(call, rounds=30, warmup_rounds=3)
