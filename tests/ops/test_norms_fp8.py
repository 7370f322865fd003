"""`td_rms_norm_fp8`, `td_layer_norm_fp8`: the norm with its rows quantised to e4m3, and its sum."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dimr_fast import ops
from tests.support.aot import Launch, compiled, meta
from tests.support.fp8 import FP8_TARGETS, assert_nearest, dequantised
from tests.support.oracle import DEVICE, seeded, skip_module_without_triton

skip_module_without_triton()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["triton", "reference"])


def rms_normed(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-8)


def layer_normed(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


class Case(NamedTuple):
    """A norm: the names of its parameters, its meaning, and the sizes that are compiled."""

    parameters: tuple[str, ...]
    normed: Callable[[Tensor], Tensor]
    compiled: dict[tuple[int, int], tuple[str, ...]]


CASES = {
    "td_rms_norm": Case(
        ("scale",),
        rms_normed,
        {(257, 960): FP8_TARGETS, (1024, 480): ("sm_90",), (257, 1152): ("sm_90",)},
    ),
    "td_layer_norm": Case(
        ("weight", "bias"), layer_normed, {(64, 768): FP8_TARGETS, (256, 384): ("sm_90",)}
    ),
}
pytestmark = [pytest.mark.parametrize("norm", CASES)]


def drawn(norm: str, times: int, width: int) -> list[Tensor]:
    """Return the norm's parameters, each `[T, D]`."""
    return [seeded(times, width) + 1, seeded(times, width).flip(-1)][: len(CASES[norm].parameters)]


def run(norm: str) -> Callable[..., Any]:
    return getattr(ops, f"{norm}_fp8")


def check(
    norm: str, x: Tensor, parameters: list[Tensor], residual: Tensor | None, implementation: str
) -> None:
    """Assert that the sum is right, and the rows those of its norm in float64."""
    summed, rows = run(norm)(x, *parameters, residual, implementation=implementation)
    expected = x if residual is None else residual + x
    # Triton's interpreter truncates where PyTorch rounds.
    torch.testing.assert_close(summed, expected, rtol=torch.finfo(x.dtype).eps, atol=0)
    ones = [1] * (x.dim() - 2)
    scale, *shift = (p.double().view(len(p), *ones, x.shape[-1]) for p in parameters)
    truth = CASES[norm].normed(summed.double()) * scale + sum(shift)
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
    norm: str,
    shape: tuple[int, ...],
    times: int,
    with_residual: bool,
    dtype: torch.dtype,
    implementation: str,
) -> None:
    x = seeded(*shape).to(dtype)
    residual = (2 * seeded(*shape).flip(0)).to(dtype) if with_residual else None
    check(norm, x, drawn(norm, times, shape[-1]), residual, implementation)


@settings(max_examples=20, deadline=None)
@given(
    images=st.integers(0, 3),
    rows=st.integers(0, 12),
    width=st.integers(2, 200),
    shared=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    norm: str, images: int, rows: int, width: int, shared: bool, dtype: torch.dtype
) -> None:
    x = seeded(images, rows, width).to(dtype)
    check(norm, x, drawn(norm, 1 if shared else images, width), x.flip(0), "triton")


def test_strided_inputs(norm: str) -> None:
    x = seeded(6, 4, 2, 48)[::2, 1:, 1]
    check(norm, x, drawn(norm, 3, 48), x.transpose(0, 1), "triton")


def test_values_that_are_views_of_one_buffer(norm: str) -> None:
    parameters = [part[:, 16:32] for part in drawn(norm, 3, 64)]
    check(norm, seeded(3, 4, 16), parameters, None, "triton")


@IMPLEMENTATIONS
def test_a_row_of_zeros_and_large_and_small_rows(norm: str, implementation: str) -> None:
    x = seeded(1, 4, 64) * torch.tensor([0.0, 1e-6, 1.0, 1e6], device=DEVICE)[None, :, None]
    check(norm, x, drawn(norm, 1, 64), None, implementation)


def test_no_output_is_left_unwritten(norm: str, poisoned_memory: None) -> None:
    x = seeded(2, 11, 300)
    summed, rows = run(norm)(x, *drawn(norm, 2, 300), x, implementation="triton")
    assert summed.isfinite().all()
    assert dequantised(rows).isfinite().all()


def test_auto_on_a_cpu_takes_the_reference(norm: str) -> None:
    x = seeded(2, 3, 8).cpu()
    parameters = [torch.ones(1, 8) for _ in CASES[norm].parameters]
    _, ours = run(norm)(x, *parameters)
    _, theirs = run(norm)(x, *parameters, implementation="reference")
    assert torch.equal(ours.values.float(), theirs.values.float())
    assert torch.equal(ours.scales, theirs.scales)


@pytest.mark.versions
def test_operator_passes_opcheck(norm: str) -> None:
    x, parameters = seeded(2, 5, 24), drawn(norm, 2, 24)
    operator = getattr(torch.ops.dimr_fast, f"{norm}_fp8").triton
    torch.library.opcheck(operator, (x, x.flip(0), *parameters))
    torch.library.opcheck(operator, (x, None, *parameters))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": seeded(4)}, r"x: got shape \(4,\)"),
    ({"x": torch.ones(2, 3, 4, dtype=torch.int32)}, "x: got dtype torch.int32"),
    ({"residual": seeded(2, 3, 5)}, r"residual: got shape \(2, 3, 5"),
    ({"implementation": "cpu"}, "_fp8 has 'auto'"),
    ({"x": seeded(2, 3, 4).double(), "implementation": "triton"}, "x is float64"),
]


def arguments(norm: str) -> dict[str, Any]:
    return {"x": seeded(2, 3, 4)} | {name: seeded(1, 4) for name in CASES[norm].parameters}


@pytest.mark.parametrize(("changed", "message"), BAD)
def test_bad_input_names_the_argument(norm: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(norm)(**(arguments(norm) | changed))


def test_a_parameter_of_other_times_is_named(norm: str) -> None:
    for name in CASES[norm].parameters:
        with pytest.raises(ValueError, match=rf"{name}: got shape \(3, 4"):
            run(norm)(**(arguments(norm) | {name: seeded(3, 4)}))


def aot_launches() -> list[Launch]:
    from dimr_fast.kernels import td_layer_norm, td_rms_norm

    launchers = {"td_rms_norm": td_rms_norm.launch_fp8, "td_layer_norm": td_layer_norm.launch_fp8}
    launches = []
    for norm, case in CASES.items():
        for (tokens, width), targets in case.compiled.items():
            x, value = meta(4, tokens, width), meta(1, width, dtype=torch.float32)
            parameters = [value] * len(case.parameters)
            launches += [
                Launch(
                    f"{norm}, {width}, {'without' if residual is None else 'with'} residual",
                    lambda run=launchers[norm], given=(x, residual, *parameters): run(*given),
                    targets,
                    oldest=89,
                )
                for residual in (x, None)
            ]
    return launches


@pytest.mark.slow
@pytest.mark.versions
def test_compiled_kernels_do_not_spill_and_convert_in_hardware(norm: str) -> None:
    kernels = [k for k in compiled("tests.ops.test_norms_fp8") if k.launch.startswith(f"{norm},")]
    assert len(kernels) == 2 * sum(map(len, CASES[norm].compiled.values()))
    for kernel in kernels:
        assert kernel.spilled == kernel.count("LDL") == kernel.count("STL") == 0, kernel
        assert kernel.count("F2FP.SATFINITE.E4M3") > 0, kernel
        # Features and sums move in 16 bytes; values and the parameters of a time may in 8.
        assert kernel.opcodes["LDG.E.128"] > 0, kernel
