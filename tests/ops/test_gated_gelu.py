"""`gated_gelu` by Triton (interpreted without a GPU) and by the compiled CPU library."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dimr_fast import ops
from tests.support.aot import TARGETS, Launch, compiled, meta
from tests.support.cpu_library import each_implementation, needs_cpu, on_threads
from tests.support.oracle import (
    DEVICE,
    assert_as_accurate,
    seeded,
    skip_module_without_triton,
    with_gradients,
)

skip_module_without_triton()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def by(implementation: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: ops.gated_gelu(x, implementation=implementation)


ours = by("triton")


def plain(x: torch.Tensor) -> torch.Tensor:
    return ops.gated_gelu(x, implementation="reference")


def test_reference_is_the_exact_gelu() -> None:
    x = seeded(3, 8).double()
    a, b = x[:, :4], x[:, 4:]
    expected = a * 0.5 * (1 + torch.special.erf(a / 2**0.5)) * b
    torch.testing.assert_close(ops.gated_gelu(x), expected)


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(2, 5, 3840), (1, 3, 4608), (2, 2, 2, 1920), (1, 3, 960), (3, 1, 14), (5, 66), (3840,), (2,)],
    ids=str,
)
def test_forward_and_gradient(
    shape: tuple[int, ...], dtype: torch.dtype, implementation: str
) -> None:
    x = 2 * seeded(*shape)
    assert_as_accurate(with_gradients(by(implementation)), with_gradients(plain), x, dtype=dtype)


RANGES = {
    "left tail": (-12.0, 0.0),
    "around zero": (-1e-3, 1e-3),
    "tiny": (-1e-7, 1e-7),
    "right tail": (3.0, 12.0),
    "largest of fp16": (-65504.0, 65504.0),
}


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RANGES)
def test_adversarial_gates(name: str, dtype: torch.dtype, implementation: str) -> None:
    a = torch.linspace(*RANGES[name], 301).to(DEVICE)
    x = torch.cat([a, seeded(301).clamp(-1, 1)])
    assert_as_accurate(with_gradients(by(implementation)), with_gradients(plain), x, dtype=dtype)


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("left", range(-6, 6))
def test_half_precision_gates_unit_by_unit(
    left: int, dtype: torch.dtype, implementation: str
) -> None:
    """Compare each interval of gates separately: errors of small results count as well."""
    a = torch.linspace(left, left + 1, 257).to(DEVICE)
    x = torch.cat([a, torch.ones_like(a)])
    assert_as_accurate(with_gradients(by(implementation)), with_gradients(plain), x, dtype=dtype)


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_any_size_have_a_finite_gradient(dtype: torch.dtype, implementation: str) -> None:
    largest = torch.finfo(dtype).max
    a = torch.tensor([-largest, -1e4, -20, -0.0, 0.0, 20, 1e4, largest])
    x = torch.cat([a, torch.ones(8)]).to(DEVICE, dtype)
    for actual, truth in zip(
        with_gradients(by(implementation))(x), with_gradients(plain)(x.double()), strict=True
    ):
        torch.testing.assert_close(actual, truth.to(dtype))


@each_implementation
def test_what_is_not_finite_stays_so(implementation: str) -> None:
    values = torch.tensor([float("nan"), float("inf"), float("-inf")], device=DEVICE)
    ones = torch.ones_like(values)
    for x in (torch.cat([values, ones]), torch.cat([ones, values])):
        assert not by(implementation)(x).isfinite().any()


@each_implementation
@settings(max_examples=25, deadline=None)
@given(
    images=st.integers(0, 3),
    rows=st.integers(0, 20),
    hidden=st.integers(0, 200),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    images: int, rows: int, hidden: int, dtype: torch.dtype, implementation: str
) -> None:
    x = seeded(images, rows, 2 * hidden)
    assert_as_accurate(with_gradients(by(implementation)), with_gradients(plain), x, dtype=dtype)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "without the class token": lambda x: x[:, 1:],
    "permuted": lambda x: x.transpose(0, 1),
    "every other column": lambda x: x[..., ::2],
    "a slot of a buffer": lambda x: x.unflatten(-1, (2, -1))[..., 1, :],
    "expanded": lambda x: x[:1].expand(4, -1, -1),
    "rows of a column block": lambda x: x[0, :, 4:20],
    "a column": lambda x: x[0, :, 3],
}


@each_implementation
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout: str, implementation: str) -> None:
    x = LAYOUTS[layout](seeded(3, 6, 48))
    expected = with_gradients(plain)(x.contiguous())
    for actual, truth in zip(with_gradients(by(implementation))(x), expected, strict=True):
        torch.testing.assert_close(actual, truth)


@each_implementation
@pytest.mark.parametrize("layout", ["permuted", "expanded"])
def test_strided_gradients(layout: str, implementation: str) -> None:
    x = seeded(4, 4, 48).requires_grad_()
    dy = LAYOUTS[layout](seeded(4, 4, 24))
    (actual,) = torch.autograd.grad(by(implementation)(x), x, dy)
    (expected,) = torch.autograd.grad(plain(x), x, dy)
    torch.testing.assert_close(actual, expected)


@each_implementation
def test_results_are_deterministic(implementation: str) -> None:
    x = seeded(2, 40, 96)
    first, second = (with_gradients(by(implementation))(x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_implementation
def test_backward_keeps_nothing_but_the_input(implementation: str) -> None:
    x = seeded(2, 3, 8).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        by(implementation)(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


@pytest.mark.versions
@each_implementation
def test_fullgraph_forward_and_backward_equal_eager(implementation: str) -> None:
    x = seeded(2, 5, 24)
    eager = with_gradients(by(implementation))(x)
    for backend in ("aot_eager", "inductor"):
        graph = torch.compile(by(implementation), fullgraph=True, backend=backend)
        for actual, truth in zip(with_gradients(graph)(x), eager, strict=True):
            torch.testing.assert_close(actual, truth)


def test_operators_pass_opcheck() -> None:
    x, dy = seeded(2, 5, 24), seeded(2, 5, 12)
    torch.library.opcheck(torch.ops.dimr_fast.gated_gelu_fwd.triton, (x[:, 1:].bfloat16(),))
    torch.library.opcheck(torch.ops.dimr_fast.gated_gelu_bwd.triton, (dy, x, True))


@pytest.mark.versions
@needs_cpu
def test_compiled_operators_pass_opcheck() -> None:
    x, dy = seeded(2, 5, 24), seeded(2, 5, 12)
    torch.library.opcheck(torch.ops.dimr_fast.gated_gelu_fwd.default, (x[:, 1:].bfloat16(),))
    torch.library.opcheck(torch.ops.dimr_fast.gated_gelu_bwd.default, (dy, x, True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(instruction_set: None, dtype: torch.dtype) -> None:
    for hidden in (1, 7, 17, 33, 64):
        x = 3 * seeded(3, 5, 2 * hidden)
        assert_as_accurate(with_gradients(by("cpu")), with_gradients(plain), x, dtype=dtype)
    for left, right in RANGES.values():
        x = torch.cat([torch.linspace(left, right, 301), seeded(301).clamp(-1, 1)])
        assert_as_accurate(with_gradients(by("cpu")), with_gradients(plain), x, dtype=dtype)


def test_results_do_not_depend_on_threads(instruction_set: None) -> None:
    x = seeded(4, 300, 190)
    one, three = (on_threads(n, lambda: with_gradients(by("cpu"))(x)) for n in (1, 3))
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@needs_cpu
def test_a_cpu_takes_the_compiled_operator() -> None:
    x = seeded(2, 3, 8)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.gated_gelu(x), by("cpu")(x))
    assert ops.gated_gelu(x.double()).dtype == torch.float64


@needs_cpu
@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("x", lambda dy, x: (dy, x[..., 1:])),
        ("x", lambda dy, x: (dy.double(), x.double())),
        ("dy", lambda dy, x: (dy[1:], x)),
        ("dy", lambda dy, x: (dy.half(), x)),
    ],
)
def test_the_bare_operator_refuses_what_it_cannot_read(argument: str, change: Any) -> None:
    with pytest.raises(RuntimeError, match=f"{argument}: "):
        torch.ops.dimr_fast.gated_gelu_bwd.default(
            *change(seeded(2, 5, 12), seeded(2, 5, 24)), True
        )


@each_implementation
def test_no_output_is_left_unwritten(poisoned_memory: None, implementation: str) -> None:
    for result in with_gradients(by(implementation))(seeded(2, 11, 300)):
        assert result.isfinite().all()


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: ops.gated_gelu(torch.zeros(2, 5)), r"x: got shape \(2, 5\).*even"),
    (lambda: ours(torch.zeros(())), r"x: got shape \(\)"),
    (lambda: ours(seeded(2, 4).double()), "x is float64"),
    (lambda: ours(torch.ones(2, 4, dtype=torch.int32)), "x: got dtype torch.int32"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_names_the_argument(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_addresses_past_32_bits() -> None:
    """Rows are far apart: the last begins more than 2³¹ elements after the first.

    The buffer takes 4 GiB of address space in fp16, but only the pages of the rows use memory.
    """
    far = (2**31 + 4096) // 2
    x = torch.empty(2 * far + 8, dtype=torch.float16, device=DEVICE)
    rows = x.as_strided((1, 3, 8), (0, far, 1))
    rows.copy_(seeded(1, 3, 8))
    for actual, truth in zip(
        with_gradients(ours)(rows), with_gradients(plain)(rows.clone()), strict=True
    ):
        torch.testing.assert_close(actual, truth)


HIDDEN = {1920: TARGETS, 960: ("sm_90",), 2304: ("sm_90",), 1152: ("sm_90",), 480: ("sm_90",)}


def aot_launches() -> list[Launch]:
    from dimr_fast.kernels.gated_gelu import launch_bwd, launch_fwd

    launches = []
    for hidden, targets in HIDDEN.items():
        x, dy = meta(4, 257, 2 * hidden), meta(4, 257, hidden)
        launches += [
            Launch(f"forward {hidden}", lambda x=x: launch_fwd(x), targets),
            Launch(f"backward {hidden}", lambda x=x, dy=dy: launch_bwd(dy, x, True), targets),
        ]
    x, dy = meta(4, 257, 3840, dtype=torch.float32), meta(4, 257, 1920, dtype=torch.float32)
    return [
        *launches,
        Launch("forward fp32", lambda: launch_fwd(x)),
        Launch("backward fp32", lambda: launch_bwd(dy, x, True)),
    ]


@pytest.mark.slow
@pytest.mark.versions
def test_compiled_kernels_do_not_spill() -> None:
    for kernel in compiled("tests.ops.test_gated_gelu"):
        assert kernel.spilled == 0, kernel
        assert kernel.count("LDL") == kernel.count("STL") == 0, kernel


@pytest.mark.slow
def test_elements_move_in_16_byte_pieces() -> None:
    for kernel in compiled("tests.ops.test_gated_gelu"):
        if kernel.target != "gfx942":
            assert kernel.count("LDG") == kernel.opcodes["LDG.E.128"] > 0, kernel
            assert kernel.count("STG") == kernel.opcodes["STG.E.128"] > 0, kernel
