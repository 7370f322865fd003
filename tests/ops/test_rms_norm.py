"""`rms_norm`: `td_rms_norm` at one time, with a plain scale."""

from typing import Any

import pytest
import torch

from dimr_fast import ops, reference
from tests.support.oracle import assert_as_accurate, seeded, with_gradients


@pytest.fixture(scope="module", params=["triton", "cpu", "reference"])
def implementation(request: pytest.FixtureRequest) -> str:
    reason = ops.OPERATORS["rms_norm"].why_not(request.param, seeded(1))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 17, 960), (3, 2, 2, 13), (2, 8), (0, 3, 8)], ids=str)
def test_forward_and_gradients(
    implementation: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    assert_as_accurate(
        with_gradients(lambda x, scale: ops.rms_norm(x, scale, implementation=implementation)),
        with_gradients(reference.rms_norm),
        seeded(*shape),
        seeded(shape[-1]),
        dtype=dtype,
    )


def test_residual(implementation: str) -> None:
    x, scale, residual = seeded(2, 3, 8), seeded(8), seeded(2, 3, 8).flip(0)

    def ours(x: torch.Tensor, scale: torch.Tensor, residual: torch.Tensor) -> Any:
        return ops.rms_norm(x, scale, residual, implementation=implementation)

    def plain(x: torch.Tensor, scale: torch.Tensor, residual: torch.Tensor) -> Any:
        return x + residual, reference.rms_norm(x + residual, scale)

    assert_as_accurate(
        with_gradients(ours), with_gradients(plain), x, scale, residual, dtype=torch.float32
    )


@pytest.mark.versions
def test_fullgraph(implementation: str) -> None:
    x, scale = seeded(2, 3, 8), seeded(8)
    graph = torch.compile(
        lambda x, s: ops.rms_norm(x, s, implementation=implementation), fullgraph=True
    )
    for a, b in zip(
        with_gradients(graph)(x, scale), with_gradients(reference.rms_norm)(x, scale), strict=True
    ):
        torch.testing.assert_close(a, b)
