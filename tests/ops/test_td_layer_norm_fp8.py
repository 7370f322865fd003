"""`td_layer_norm_fp8`: the norm with its rows quantised to e4m3, and the sum that it writes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dimr_fast import ops
from tests.support.aot import Launch, compiled, meta
from tests.support.fp8 import FP8_TARGETS, assert_nearest, dequantised
from tests.support.oracle import DEVICE, seeded, skip_module_without_triton

skip_module_without_triton()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["triton", "reference"])


def per_image(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return a value `[T, D]` in float64, to broadcast over `[B, …, D]`."""
    return value.double().view(len(value), *[1] * (x.dim() - 2), x.shape[-1])


def drawn(times: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a scale and a shift per time, each `[T, D]`."""
    return seeded(times, width) + 1, seeded(times, width).flip(-1)


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    implementation: str,
) -> None:
    """Assert that the sum is right, and the rows those of its norm in float64."""
    summed, rows = ops.td_layer_norm_fp8(x, weight, bias, residual, implementation=implementation)
    expected = x if residual is None else residual + x
    # Triton's interpreter truncates where PyTorch rounds.
    torch.testing.assert_close(summed, expected, rtol=torch.finfo(x.dtype).eps, atol=0)
    wide = summed.double()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    truth = normed * per_image(weight, x) + per_image(bias, x)
    # A sum of D terms in fp32, in any order.
    error = 1e-5 * (truth.abs() + truth.abs().amax(-1, keepdim=True))
    assert_nearest(rows, truth, error)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize(
    ("shape", "times"),
    [((2, 5, 960), 2), ((1, 3, 480), 1), ((2, 2, 3, 33), 1), ((3, 7, 240), 3), ((4, 16), 4)],
)
def test_rows_are_rounded_to_the_nearest_values(
    shape: tuple[int, ...],
    times: int,
    with_residual: bool,
    dtype: torch.dtype,
    implementation: str,
) -> None:
    x = seeded(*shape).to(dtype)
    residual = (2 * seeded(*shape).flip(0)).to(dtype) if with_residual else None
    check(x, *drawn(times, shape[-1]), residual, implementation)


@settings(max_examples=20, deadline=None)
@given(
    images=st.integers(0, 3),
    rows=st.integers(0, 12),
    width=st.integers(2, 200),
    shared=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(images: int, rows: int, width: int, shared: bool, dtype: torch.dtype) -> None:
    shape, times = (images, rows, width), 1 if shared else images
    x = seeded(*shape).to(dtype)
    check(x, *drawn(times, shape[-1]), x.flip(0), "triton")


def test_strided_inputs() -> None:
    x, times, shape = seeded(6, 4, 2, 48)[::2, 1:, 1], 3, (48,)
    check(x, *drawn(times, shape[-1]), x.transpose(0, 1), "triton")


def test_values_that_are_views_of_one_buffer() -> None:
    x, times, shape = seeded(3, 4, 16), 3, (64,)
    buffer = seeded(times, *shape)
    check(x, buffer[:, 16:32], buffer[:, 40:56], None, "triton")


@IMPLEMENTATIONS
def test_a_row_of_zeros_and_large_and_small_rows(implementation: str) -> None:
    x = seeded(1, 4, 64) * torch.tensor([0.0, 1e-6, 1.0, 1e6], device=DEVICE)[None, :, None]
    times, shape = 1, (64,)
    check(x, *drawn(times, shape[-1]), None, implementation)


def test_no_output_is_left_unwritten(poisoned_memory: None) -> None:
    x, times, shape = seeded(2, 11, 300), 2, (300,)
    summed, rows = ops.td_layer_norm_fp8(x, *drawn(times, shape[-1]), x, implementation="triton")
    assert summed.isfinite().all()
    assert dequantised(rows).isfinite().all()


def test_auto_on_a_cpu_takes_the_reference() -> None:
    x = seeded(2, 3, 8).cpu()
    values = [torch.ones(1, 8)] * 2
    _, ours = ops.td_layer_norm_fp8(x, *values)
    _, theirs = ops.td_layer_norm_fp8(x, *values, implementation="reference")
    assert torch.equal(ours.values.float(), theirs.values.float())
    assert torch.equal(ours.scales, theirs.scales)


@pytest.mark.versions
def test_operator_passes_opcheck() -> None:
    x, times, shape = seeded(2, 5, 24), 2, (24,)
    operator = torch.ops.dimr_fast.td_layer_norm_fp8.triton
    torch.library.opcheck(operator, (x, x.flip(0), *drawn(times, shape[-1])))
    torch.library.opcheck(operator, (x, None, *drawn(times, shape[-1])))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": seeded(4)}, r"x: got shape \(4,\)"),
    ({"x": torch.ones(2, 3, 4, dtype=torch.int32)}, "x: got dtype torch.int32"),
    ({"weight": seeded(3, 4)}, r"weight: got shape \(3, 4"),
    ({"residual": seeded(2, 3, 5)}, r"residual: got shape \(2, 3, 5"),
    ({"implementation": "cpu"}, "td_layer_norm_fp8 has 'auto'"),
    ({"x": seeded(2, 3, 4).double(), "implementation": "triton"}, "x is float64"),
]


@pytest.mark.parametrize(("changed", "message"), BAD)
def test_bad_input_names_the_argument(changed: dict[str, Any], message: str) -> None:
    arguments = {"x": seeded(2, 3, 4), "weight": seeded(1, 4), "bias": seeded(1, 4)} | changed
    with pytest.raises(ValueError, match=message):
        ops.td_layer_norm_fp8(**arguments)


def aot_launches() -> list[Launch]:
    from dimr_fast.kernels.td_layer_norm import launch_fp8

    launches = []
    for tokens, width, targets in ((64, 768, FP8_TARGETS), (256, 384, ("sm_90",))):
        x, value = meta(4, tokens, width), meta(1, width, dtype=torch.float32)
        launches += [
            Launch(
                f"{width} {'without' if residual is None else 'with'} residual",
                lambda x=x, r=residual, v=value: launch_fp8(x, r, v, v),
                targets,
                oldest=89,
            )
            for residual in (x, None)
        ]
    return launches


@pytest.mark.slow
@pytest.mark.versions
def test_compiled_kernels_do_not_spill_and_convert_in_hardware() -> None:
    kernels = compiled("tests.ops.test_td_layer_norm_fp8")
    assert len(kernels) == 2 * (len(FP8_TARGETS) + 1)
    for kernel in kernels:
        assert kernel.spilled == kernel.count("LDL") == kernel.count("STL") == 0, kernel
        assert kernel.count("F2FP.SATFINITE.E4M3") > 0, kernel
        # Features and sums move in 16 bytes; values and the parameters of a time may in 8.
        assert kernel.opcodes["LDG.E.128"] > 0, kernel
