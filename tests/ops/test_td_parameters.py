"""`td_parameters` by Triton (interpreted without a GPU) and by the compiled CPU library."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dimr_fast import DiMR, ops
from dimr_fast.layers import TDParameter
from tests.support.aot import TARGETS, Launch, compiled
from tests.support.cpu_library import each_implementation, needs_cpu, on_threads
from tests.support.oracle import (
    DEVICE,
    assert_as_accurate,
    seeded,
    skip_module_without_triton,
    with_gradients,
)
from tests.support.td_parameters import by, times, vectors_of

skip_module_without_triton()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def td_parameters_of(model: DiMR) -> list[TDParameter]:
    return [module for module in model.modules() if isinstance(module, TDParameter)]


def check(
    implementation: str, tau: torch.Tensor, vectors: Sequence[torch.Tensor], dtype: torch.dtype
) -> None:
    assert_as_accurate(
        with_gradients(by(implementation, tau)),
        with_gradients(by("reference", tau)),
        *vectors,
        dtype=dtype,
    )


def test_reference_is_each_parameter_by_itself() -> None:
    tau = torch.linspace(-1, 1, 3)
    parameters: Any = [tuple(seeded(width).cpu() + i for i in range(4)) for width in (5, 1, 8)]
    values = ops.td_parameters(tau, parameters)
    assert [tuple(v.shape) for v in values] == [(3, 5), (3, 1), (3, 8)]
    for value, (p0, p1, w, b) in zip(values, parameters, strict=True):
        for i in range(3):
            gate = 1 / (1 + torch.exp(-((w.double() + 1) * tau[i] + b)))
            expected = p1 + gate * (p0.double() - p1)
            torch.testing.assert_close(value[i].double(), expected, atol=1e-6, rtol=1e-6)


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 4, 19])
def test_forward_and_gradients(count: int, dtype: torch.dtype, implementation: str) -> None:
    check(implementation, times(count), vectors_of(960, 480, 1, 7, 1152, 130), dtype)


@each_implementation
def test_the_widest_parameter_of_a_cascade(implementation: str) -> None:
    check(implementation, times(3), vectors_of(38400, 960), torch.float32)


@each_implementation
def test_parameters_of_a_model(implementation: str) -> None:
    model = DiMR.from_preset("tiny").to(DEVICE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    check(
        implementation,
        times(2),
        [v for p in td_parameters_of(model) for v in p.vectors],
        torch.float32,
    )


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.0, 1e-6, 30.0, 100.0, 1e4], ids=str)
def test_adversarial_gates(size: float, dtype: torch.dtype, implementation: str) -> None:
    """Gates from closed to open: no division of infinities, no cancellation."""
    p0, p1 = seeded(64), seeded(64).flip(0)
    slope = torch.linspace(-size, size, 64, device=DEVICE)
    for w, b in ((slope - 1, torch.zeros_like(slope)), (slope.flip(0), slope)):
        check(implementation, times(3), [p0, p1, w, b], dtype)
        for result in with_gradients(by(implementation, times(3)))(p0, p1, w, b):
            assert result.isfinite().all()


@each_implementation
@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(0, 300), min_size=1, max_size=5),
    count=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(widths: list[int], count: int, dtype: torch.dtype, implementation: str) -> None:
    check(implementation, times(count), vectors_of(*widths), dtype)


def test_no_parameters_have_no_values() -> None:
    for implementation in ("triton", "auto", "reference"):
        assert ops.td_parameters(times(3), [], implementation=implementation) == ()


@each_implementation
def test_no_times_give_no_gradient(implementation: str) -> None:
    vectors = vectors_of(5, 24)
    *values, dp0, dp1, dw, db = with_gradients(by(implementation, times(0)))(*vectors[:4])
    assert [tuple(v.shape) for v in values] == [(0, 5)]
    assert all(torch.equal(g, torch.zeros_like(g)) for g in (dp0, dp1, dw, db))


def test_a_parameter_named_twice_gets_both_gradients() -> None:
    twice = [v.requires_grad_() for v in vectors_of(24)]
    parameters: Any = [tuple(twice), tuple(vectors_of(8)), tuple(twice)]
    found = []
    for implementation in ("triton", "reference"):
        values = ops.td_parameters(times(3), parameters, implementation=implementation)
        loss = sum((i * v).sum() for i, v in enumerate(values, 1))
        found.append(torch.autograd.grad(loss, twice))
    for actual, truth in zip(*found, strict=True):
        torch.testing.assert_close(actual, truth)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "columns of a matrix": lambda x: x[:, 3],
    "every other element": lambda x: x[0, ::2],
    "expanded": lambda x: x[0, :1].expand(40),
    "not on 16 bytes": lambda x: x[0, 1:33],
    "on 16 bytes": lambda x: x[0, 16:32],
}


@each_implementation
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_vectors(layout: str, implementation: str) -> None:
    vectors = [LAYOUTS[layout](seeded(40, 40) + i) for i in range(4)]
    expected = with_gradients(by("reference", times(2)))(*[v.contiguous() for v in vectors])
    tau = times(4)[::3]
    for actual, truth in zip(
        with_gradients(by(implementation, tau))(*vectors), expected, strict=True
    ):
        torch.testing.assert_close(actual, truth)


@each_implementation
def test_a_model_that_is_partly_frozen(implementation: str) -> None:
    p0, p1, w, b = vectors_of(24)
    (actual,) = torch.autograd.grad(
        by(implementation, times(3))(p0, p1.requires_grad_(), w, b)[0].sum(), p1
    )
    (expected,) = torch.autograd.grad(by("reference", times(3))(p0, p1, w, b)[0].sum(), p1)
    torch.testing.assert_close(actual, expected)


@each_implementation
def test_gradients_are_deterministic(implementation: str) -> None:
    vectors = vectors_of(130, 24)
    first, second = (with_gradients(by(implementation, times(21)))(*vectors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_implementation
def test_gradients_may_be_changed_in_place(implementation: str) -> None:
    """Gradients are views of one buffer; clipping and accumulation write to them."""
    leaves = [v.requires_grad_() for v in vectors_of(24, 8)]
    optimizer = torch.optim.AdamW(leaves, lr=0.1)
    for _ in range(2):
        for _ in range(2):
            torch.cat(by(implementation, times(3))(*leaves), -1).square().sum().backward()
        expected = [v.detach().clone().requires_grad_() for v in leaves]
        loss = torch.cat(by("reference", times(3))(*expected), -1).square().sum()
        for leaf, truth in zip(leaves, torch.autograd.grad(loss, expected), strict=True):
            torch.testing.assert_close(leaf.grad, 2 * truth)
        torch.nn.utils.clip_grad_norm_(leaves, 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


@pytest.mark.versions
@each_implementation
def test_fullgraph_forward_and_backward_equal_eager(implementation: str) -> None:
    vectors, tau = vectors_of(24, 8, 33), times(3)
    eager = with_gradients(by(implementation, tau))(*vectors)
    for backend in ("aot_eager", "inductor"):
        graph = torch.compile(by(implementation, tau), fullgraph=True, backend=backend)
        for actual, truth in zip(with_gradients(graph)(*vectors), eager, strict=True):
            torch.testing.assert_close(actual, truth)


def test_operators_pass_opcheck() -> None:
    vectors = vectors_of(24, 8)
    kinds = [vectors[i::4] for i in range(4)]
    fwd = torch.ops.dimr_fast.td_parameters_fwd.triton
    bwd = torch.ops.dimr_fast.td_parameters_bwd.triton
    torch.library.opcheck(fwd, (times(3), *kinds))
    torch.library.opcheck(fwd, (times(3), *[[v.bfloat16() for v in kind] for kind in kinds]))
    torch.library.opcheck(bwd, (seeded(3, 32), times(3), *kinds))


@pytest.mark.versions
@needs_cpu
def test_compiled_operators_pass_opcheck() -> None:
    vectors = vectors_of(24, 8)
    kinds = [vectors[i::4] for i in range(4)]
    fwd = torch.ops.dimr_fast.td_parameters_fwd.default
    bwd = torch.ops.dimr_fast.td_parameters_bwd.default
    torch.library.opcheck(fwd, (times(3), *kinds))
    torch.library.opcheck(fwd, (times(3), *[[v.bfloat16() for v in kind] for kind in kinds]))
    torch.library.opcheck(bwd, (seeded(3, 32), times(3), *kinds))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(instruction_set: None, dtype: torch.dtype) -> None:
    check("cpu", times(5), vectors_of(7, 17, 33, 300), dtype)
    slope = torch.linspace(-100, 100, 64)
    check("cpu", times(3), [seeded(64), seeded(64).flip(0), slope, slope.flip(0)], dtype)


def test_results_do_not_depend_on_threads(instruction_set: None) -> None:
    vectors = vectors_of(960, 33, 1152, 64)
    one, three = (
        on_threads(n, lambda: with_gradients(by("cpu", times(32)))(*vectors)) for n in (1, 3)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@needs_cpu
@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("tau", lambda dv, tau, kinds: (dv, tau[None], *kinds)),
        ("dvalues", lambda dv, tau, kinds: (dv[:, 1:], tau, *kinds)),
        ("parameters", lambda dv, tau, kinds: (dv, tau, *kinds[:3], kinds[3][:1])),
        (r"parameters\[0\]", lambda dv, tau, kinds: (dv, tau, *kinds[:3], kinds[3][::-1])),
        ("param0", lambda dv, tau, kinds: (dv, tau, *[[v.double() for v in k] for k in kinds])),
    ],
)
def test_the_bare_operator_refuses_what_it_cannot_read(argument: str, change: Any) -> None:
    vectors = vectors_of(24, 24, 8)
    kinds = [vectors[i::4] for i in range(4)]
    with pytest.raises(RuntimeError, match=f"{argument}"):
        torch.ops.dimr_fast.td_parameters_bwd.default(*change(seeded(3, 56), times(3), kinds))


@each_implementation
def test_no_output_is_left_unwritten(poisoned_memory: None, implementation: str) -> None:
    for result in with_gradients(by(implementation, times(3)))(*vectors_of(24, 300, 7)):
        assert result.isfinite().all()


def test_the_reference_serves_what_the_kernels_do_not() -> None:
    vectors = vectors_of(24)
    for implementation in ("auto", "reference"):
        tau = times(3).requires_grad_()
        by(implementation, tau)(*vectors)[0].sum().backward()
        assert tau.grad is not None
    doubles: Any = [tuple(v.double() for v in vectors)]
    assert ops.td_parameters(times(3), doubles)[0].dtype == torch.float64


def call(implementation: str = "triton", tau: torch.Tensor | None = None, **change: Any) -> Any:
    """Call the operator with three parameters; keywords replace vectors of the second."""
    names = ("param0", "param1", "weight", "bias")
    second = tuple(change.get(name, torch.ones(8, device=DEVICE)) for name in names)
    parameters: Any = [tuple(vectors_of(5)), second, tuple(vectors_of(6))]
    tau = times(2) if tau is None else tau
    return ops.td_parameters(tau, parameters, implementation=implementation)


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: ops.td_parameters(torch.zeros(2, 2), []), r"tau: got shape \(2, 2\)"),
    (lambda: call(bias=torch.ones(7)), r"parameters\[1\]: got shapes \[\(8,\), .*\(7,\)\]"),
    (lambda: call(param0=torch.ones(1, 8)), r"parameters\[1\]: got shapes \[\(1, 8\)"),
    (lambda: call(weight=torch.ones(8).half().to(DEVICE)), r"parameters\[1\]: got dtype"),
    (lambda: call(weight=torch.ones(8, device="meta")), r"parameters\[1\]: got device meta"),
    (lambda: call("reference", param1=torch.ones(7)), r"parameters\[1\]: got shapes"),
    (lambda: call(tau=times(2).requires_grad_()), "no gradient with respect to tau"),
    (lambda: call(tau=times(2).double()), "x is float64"),
    (lambda: by("triton", times(2))(*[v.int() for v in vectors_of(3)]), "parameters are int32"),
]


@pytest.mark.parametrize(("bad_call", "message"), BAD)
def test_bad_input_names_the_argument(bad_call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad_call()


def test_addresses_past_32_bits() -> None:
    """Times are far apart: the last begins more than 2³¹ elements after the first.

    The buffer takes 4 GiB of address space in fp16, but only the pages of the rows use memory.
    """
    far = (2**31 + 4096) // 2
    buffer = torch.empty(2 * far + 24, dtype=torch.float16, device=DEVICE)
    dvalues = buffer.as_strided((3, 24), (far, 1))
    dvalues.copy_(seeded(3, 24))
    kinds = [[v] for v in vectors_of(24)]
    backward = torch.ops.dimr_fast.td_parameters_bwd.triton
    expected = backward(dvalues.contiguous(), times(3), *kinds)
    torch.testing.assert_close(backward(dvalues, times(3), *kinds), expected)


def aot_launches() -> list[Launch]:
    from dimr_fast.kernels.td_parameters import launch_bwd, launch_fwd

    def kinds_of(preset: str, dtype: torch.dtype = torch.float32) -> list[list[torch.Tensor]]:
        with torch.device("meta"):
            model = DiMR.from_preset(preset).to(dtype)
        return [
            list(kind) for kind in zip(*(p.vectors for p in td_parameters_of(model)), strict=True)
        ]

    def both(name: str, kinds: Any, count: int, targets: tuple[str, ...]) -> list[Launch]:
        tau = torch.empty(count, device="meta")
        dvalues = torch.empty(count, sum(v.shape[0] for v in kinds[0]), device="meta")
        return [
            Launch(f"forward {name}", lambda: launch_fwd(tau, *kinds), targets),
            Launch(f"backward {name}", lambda: launch_bwd(dvalues, tau, *kinds), targets),
        ]

    xl = kinds_of("DiMR-XL/2R")
    return [
        *both("XL", xl, 64, TARGETS),
        *both("XL, one time", xl, 1, ("sm_90",)),
        *both("XL, bf16", kinds_of("DiMR-XL/2R", torch.bfloat16), 64, ("sm_90",)),
        *both("tiny", kinds_of("tiny"), 64, ("sm_90",)),
    ]


@pytest.mark.slow
@pytest.mark.versions
def test_compiled_kernels_do_not_spill() -> None:
    for kernel in compiled("tests.ops.test_td_parameters"):
        assert kernel.spilled == 0, kernel
        assert kernel.count("LDL") == kernel.count("STL") == 0, kernel


@pytest.mark.slow
def test_all_parameters_of_a_model_take_one_launch() -> None:
    found = [(kernel.launch, kernel.target) for kernel in compiled("tests.ops.test_td_parameters")]
    assert len(found) == len(set(found))


@pytest.mark.slow
def test_values_and_their_gradients_move_in_16_byte_pieces() -> None:
    for kernel in compiled("tests.ops.test_td_parameters"):
        if kernel.target == "gfx942" or "XL" not in kernel.launch:
            continue
        if "forward" in kernel.launch:
            assert kernel.count("STG") == kernel.opcodes["STG.E.128"] > 0, kernel
        else:
            assert kernel.opcodes["LDG.E.128"] > 0, kernel
