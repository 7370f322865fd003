"""`td_rms_norm_into`: the norm that also writes the sum that a block's last product adds to."""

from typing import Any

import pytest
import torch

from dimr_fast import ops
from tests.support.aot import TARGETS, Launch, compiled, meta
from tests.support.oracle import DEVICE, assert_as_accurate, seeded, skip_module_without_triton

skip_module_without_triton()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def into_slot(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum, written to every other row of a buffer, and the normed sum."""
    buffer = torch.full((*x.shape[:-1], 2, x.shape[-1]), float("nan"), dtype=x.dtype, device=DEVICE)
    normed = ops.td_rms_norm_into(buffer[..., 1, :], x, scale, residual, bias)
    assert buffer[..., 0, :].isnan().all(), "rows beside the slot stay as they are"
    return buffer[..., 1, :].contiguous(), normed


def plain(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    summed = x if residual is None else residual + x
    return summed + bias, ops.td_rms_norm(summed, scale, implementation="reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize(
    ("shape", "times"), [((2, 5, 48), 2), ((3, 7, 33), 1), ((1, 1, 1), 1), ((2, 3, 4500), 1)]
)
def test_as_accurate_as_the_reference(
    shape: tuple[int, ...], times: int, with_residual: bool, dtype: torch.dtype
) -> None:
    width = shape[-1]
    inputs = seeded(*shape), seeded(times, width), seeded(width)
    residual = seeded(*shape).flip(0) + 1 if with_residual else None
    assert_as_accurate(into_slot, plain, *inputs, residual, dtype=dtype)


def test_nothing_of_an_empty_batch() -> None:
    out = torch.empty(0, 3, 8, device=DEVICE)
    assert ops.td_rms_norm_into(out, out, seeded(1, 8), None, seeded(8)).shape == (0, 3, 8)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"out": seeded(2, 3, 5)}, r"out: got \(2, 3, 5\)"),
    ({"out": seeded(2, 3, 4).bfloat16()}, "out: got .*bfloat16"),
    ({"out": torch.empty(2, 3, 4, device="meta")}, "out: got device meta"),
    ({"out": seeded(2, 4, 3).mT}, "out: got strides"),
    ({"bias": seeded(5)}, "bias: got width 5"),
    ({"residual": seeded(2, 3, 5)}, r"residual: got shape \(2, 3"),
    ({"scale": seeded(3, 4)}, r"scale: got shape \(3, 4"),
]


@pytest.mark.parametrize(("changed", "message"), BAD)
def test_bad_input_names_the_argument(changed: dict[str, Any], message: str) -> None:
    arguments = {
        "out": seeded(2, 3, 4),
        "x": seeded(2, 3, 4),
        "scale": seeded(1, 4),
        "residual": None,
        "bias": seeded(4),
    } | changed
    with pytest.raises(ValueError, match=message):
        ops.td_rms_norm_into(**arguments)


@pytest.mark.versions
def test_operator_passes_opcheck() -> None:
    x, scale, bias = seeded(2, 5, 24), seeded(2, 24), seeded(24)
    operator = torch.ops.dimr_fast.td_rms_norm_into.triton
    torch.library.opcheck(operator, (torch.empty_like(x), x, x.flip(0), scale, bias))
    torch.library.opcheck(operator, (torch.empty_like(x), x, None, scale, bias))


def aot_launches() -> list[Launch]:
    from dimr_fast.kernels.td_rms_norm import launch_into

    launches = []
    for tokens, width, targets in ((257, 960, TARGETS), (1024, 480, ("sm_90",))):
        x, slot = meta(4, tokens, width), meta(4, tokens, 2, width)[..., 1, :]
        scale, bias = meta(1, width, dtype=torch.float32), meta(width)
        for residual in (x, None):
            launches.append(
                Launch(
                    f"{width} {'without' if residual is None else 'with'} residual",
                    lambda o=slot, x=x, r=residual, s=scale, b=bias: launch_into(o, x, r, s, b),
                    targets,
                )
            )
    return launches


@pytest.mark.slow
@pytest.mark.versions
def test_compiled_kernels_do_not_spill_and_move_rows_in_16_byte_pieces() -> None:
    kernels = compiled("tests.ops.test_td_rms_norm_into")
    assert len(kernels) == 2 * len(TARGETS) + 2
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        if kernel.target != "gfx942":
            # Parameters of width 480, which all rows share, are loaded in 8 bytes.
            loads = kernel.count("LDG.E.64") if "960" in kernel.launch else 0
            assert loads == kernel.count("STG.E.64") == 0, kernel
            assert kernel.count("STG.E.128") >= 2, kernel
