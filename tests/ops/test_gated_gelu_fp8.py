"""`gated_gelu_fp8`: the gate of the MLP with its rows quantised to e4m3."""

from collections.abc import Callable
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


def exact(x: torch.Tensor) -> torch.Tensor:
    """Return the gate in float64, by a formula of its own."""
    a, b = x.double().chunk(2, -1)
    return a * torch.special.ndtr(a) * b


def error(x: torch.Tensor) -> torch.Tensor:
    """Return the error that the kernel may have before it quantises.

    The error of Φ is that of fp32 or, in half precision, the one that the kernel documents.
    """
    a, b = x.double().chunk(2, -1)
    return (a * b).abs() * 1e-6 + exact(x).abs() * (1e-5 if x.dtype == torch.float32 else 2e-3)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 5, 3840), (2, 2, 2, 1920), (1, 3, 960), (5, 66), (3, 1, 14), (3840,), (2,)]
)
def test_rows_are_rounded_to_the_nearest_values(
    shape: tuple[int, ...], dtype: torch.dtype, implementation: str
) -> None:
    x = (2 * seeded(*shape)).to(dtype)
    rows = ops.gated_gelu_fp8(x, implementation=implementation)
    assert_nearest(rows, exact(x), error(x))


@settings(max_examples=20, deadline=None)
@given(
    images=st.integers(0, 3),
    rows=st.integers(0, 12),
    hidden=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(images: int, rows: int, hidden: int, dtype: torch.dtype) -> None:
    x = seeded(images, rows, 2 * hidden).to(dtype)
    found = ops.gated_gelu_fp8(x, implementation="triton")
    assert_nearest(found, exact(x), error(x))


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "without the class token": lambda x: x[:, 1:],
    "permuted": lambda x: x.transpose(0, 1),
    "every other column": lambda x: x[..., ::2],
    "a slot of a buffer": lambda x: x.unflatten(-1, (2, -1))[..., 1, :],
    "expanded": lambda x: x[:1].expand(4, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout: str) -> None:
    x = LAYOUTS[layout](seeded(3, 6, 48))
    assert_nearest(ops.gated_gelu_fp8(x, implementation="triton"), exact(x), error(x))


@IMPLEMENTATIONS
def test_rows_of_any_scale(implementation: str) -> None:
    """Rows are independent of one another: each has its own scale, also one of zeros."""
    sizes = torch.tensor([0.0, 1e-20, 1e-3, 1.0, 1e4], device=DEVICE)
    x = seeded(5, 64)
    x[:, 32:] *= sizes[:, None]
    rows = ops.gated_gelu_fp8(x, implementation=implementation)
    assert_nearest(rows, exact(x), error(x))
    assert not rows.values[0].float().any()


@IMPLEMENTATIONS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_spoils_its_row_only(value: float, implementation: str) -> None:
    if value != value and (implementation, DEVICE) == ("triton", "cpu"):
        pytest.skip("Triton's interpreter casts NaN to a number")
    x = seeded(3, 64)
    x[1, 40] = value
    found = dequantised(ops.gated_gelu_fp8(x, implementation=implementation))
    assert not found[1].isfinite().all()
    assert found[[0, 2]].isfinite().all()


def test_no_output_is_left_unwritten(poisoned_memory: None) -> None:
    assert (
        dequantised(ops.gated_gelu_fp8(seeded(2, 11, 300), implementation="triton"))
        .isfinite()
        .all()
    )


def test_auto_on_a_cpu_takes_the_reference() -> None:
    x = seeded(2, 3, 8).cpu()
    for ours, theirs in zip(
        ops.gated_gelu_fp8(x), ops.gated_gelu_fp8(x, implementation="reference"), strict=True
    ):
        assert torch.equal(ours.float(), theirs.float())


@pytest.mark.versions
def test_operator_passes_opcheck() -> None:
    torch.library.opcheck(torch.ops.dimr_fast.gated_gelu_fp8.triton, (seeded(2, 5, 24)[:, 1:],))


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: ops.gated_gelu_fp8(torch.zeros(2, 5)), r"x: got shape \(2, 5\).*even"),
    (lambda: ops.gated_gelu_fp8(torch.zeros(2, 0)), r"x: got shape \(2, 0\)"),
    (lambda: ops.gated_gelu_fp8(torch.ones(2, 4, dtype=torch.int32)), "x: got dtype torch.int32"),
    (lambda: ops.gated_gelu_fp8(seeded(2, 4), implementation="cpu"), "gated_gelu_fp8 has 'auto'"),
    (lambda: ops.gated_gelu_fp8(seeded(2, 4).double(), implementation="triton"), "x is float64"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_names_the_argument(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


HIDDEN = {1920: FP8_TARGETS, 960: ("sm_90",), 2304: ("sm_90",), 480: ("sm_90",), 64: ("sm_90",)}


def aot_launches() -> list[Launch]:
    from dimr_fast.kernels.gated_gelu import launch_fp8

    launches = []
    for hidden, targets in HIDDEN.items():
        x = meta(4, 257, 2 * hidden)
        launches.append(Launch(f"{hidden}", lambda x=x: launch_fp8(x), targets, oldest=89))
    return launches


@pytest.mark.slow
@pytest.mark.versions
def test_compiled_kernels_do_not_spill_and_convert_in_hardware() -> None:
    kernels = compiled("tests.ops.test_gated_gelu_fp8")
    assert len(kernels) == len(FP8_TARGETS) + len(HIDDEN) - 1
    for kernel in kernels:
        assert kernel.spilled == kernel.count("LDL") == kernel.count("STL") == 0, kernel
        assert kernel.count("F2FP.SATFINITE.E4M3") > 0, kernel


@pytest.mark.slow
def test_elements_move_in_16_byte_pieces() -> None:
    for kernel in compiled("tests.ops.test_gated_gelu_fp8"):
        if kernel.launch != "64":  # a row of the demo's is shorter than a warp's load
            assert kernel.count("LDG") == kernel.opcodes["LDG.E.128"] > 0, kernel
            assert kernel.opcodes["STG.E.128"] > 0, kernel
