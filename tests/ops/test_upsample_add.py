"""`upsample_add` by Triton (interpreted without a GPU) and by the compiled CPU library."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dimr_fast import ops
from tests.support.cpu_library import each_implementation, needs_cpu, on_threads
from tests.support.oracle import (
    DEVICE,
    Function,
    assert_as_accurate,
    seeded,
    skip_module_without_triton,
    with_gradients,
)
from tests.support.upsample_add import FEATURES, as_tokens, by, inputs

skip_module_without_triton()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", ["buffer", "tokens"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"times": 1},
        {"slots": 2, "width": 12, "out": 10, "q": 1, "size": (4, 3)},
        {"slots": 5, "width": 96, "out": 33, "q": 3, "size": (1, 2), "images": 1},
        {"slots": 1, "width": 8, "out": 16, "times": 1},
        {"slots": 19, "width": 9, "out": 8, "size": (1, 1)},
    ],
    ids=str,
)
def test_forward_and_gradients(
    sizes: dict[str, Any], features: str, dtype: torch.dtype, implementation: str
) -> None:
    ours = by(implementation, FEATURES[features])
    plain = by("reference", FEATURES[features])
    assert_as_accurate(with_gradients(ours), with_gradients(plain), *inputs(**sizes), dtype=dtype)


@each_implementation
@pytest.mark.parametrize(
    ("features", "dtype"),
    [("buffer", torch.float32), ("tokens", torch.bfloat16), ("strided buffer", torch.float16)],
)
def test_the_published_width(features: str, dtype: torch.dtype, implementation: str) -> None:
    # Features are summed one after another, and the interpreter takes seconds for each.
    slots = 8 if implementation == "triton" and DEVICE == "cpu" else 40
    values = inputs(images=1, size=(1, 1), slots=slots, width=960, out=8)
    ours, plain = (by(i, FEATURES[features]) for i in (implementation, "reference"))
    assert_as_accurate(with_gradients(ours), with_gradients(plain), *values, dtype=dtype)


@each_implementation
@settings(max_examples=15, deadline=None)
@given(
    images=st.integers(0, 2),
    # with too few positions the reference's own error can be nearly zero by chance
    size=st.tuples(st.integers(2, 3), st.integers(2, 3)),
    slots=st.integers(1, 10),
    width=st.integers(1, 20),
    out=st.integers(24, 40),
    q=st.integers(1, 3),
    features=st.sampled_from(list(FEATURES)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    implementation: str, features: str, dtype: torch.dtype, width: int, slots: int, **sizes: Any
) -> None:
    # A norm of one or two numbers returns signs: its gradient is only rounding errors.
    width = max(width, -(-32 // slots))
    ours, plain = (by(i, FEATURES[features]) for i in (implementation, "reference"))
    values = inputs(width=width, slots=slots, **sizes)
    assert_as_accurate(with_gradients(ours), with_gradients(plain), *values, dtype=dtype)


@each_implementation
@pytest.mark.parametrize("mean", [100, 1000])
@pytest.mark.parametrize("which", ["all", "all but the first", "every other"])
@pytest.mark.parametrize("features", ["buffer", "tokens"])
def test_features_with_means_far_above_their_deviation(
    features: str, which: str, mean: float, implementation: str
) -> None:
    x, buffer, *values = inputs(slots=6, width=96)
    chosen = {"all": slice(None), "all but the first": slice(1, None)}.get(which, slice(0, None, 2))
    buffer[..., chosen, :] += mean
    assert_as_accurate(
        with_gradients(by(implementation, FEATURES[features])),
        with_gradients(by("reference", FEATURES[features])),
        x,
        buffer,
        *values,
        dtype=torch.float32,
    )


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 7.0, 6e4, 1e-7])
def test_constant_features(value: float, dtype: torch.dtype, implementation: str) -> None:
    x, buffer, *values = inputs()
    buffer = torch.full_like(buffer, value)
    for features in (FEATURES["buffer"], as_tokens):
        ours, plain = by(implementation, features), by("reference", features)
        assert_as_accurate(ours, plain, x, buffer, *values, dtype=dtype)


@each_implementation
def test_strided_x_and_projection(implementation: str) -> None:
    x, buffer, *values = inputs(size=(2, 2))
    scale_in, shift_in, weight, *others = values
    x = x.permute(1, 2, 3, 0)[..., :1].permute(3, 1, 0, 2)
    weight = weight.mT.contiguous().mT
    strided = (
        x,
        buffer[:1],
        scale_in[:1],
        shift_in[:1],
        weight,
        others[0],
        *(o[:1] for o in others[1:]),
    )
    expected = with_gradients(by("reference"))(*(t.contiguous() for t in strided))
    for actual, truth in zip(with_gradients(by(implementation))(*strided), expected, strict=True):
        torch.testing.assert_close(actual, truth)


@each_implementation
def test_each_norm_has_its_own_times(implementation: str) -> None:
    x, buffer, scale_in, shift_in, weight, bias, scale_out, shift_out = inputs(images=3)
    values = x, buffer, scale_in, shift_in[:1], weight, bias, scale_out[:1], shift_out
    assert_as_accurate(
        with_gradients(by(implementation)),
        with_gradients(by("reference")),
        *values,
        dtype=torch.float32,
    )


@each_implementation
@pytest.mark.parametrize("features", ["buffer", "list"])
def test_detached_features_get_no_gradient_and_change_no_other(
    features: str, implementation: str
) -> None:
    values = inputs()
    make = FEATURES[features]

    def detached(f: torch.Tensor) -> Any:
        return make(f.detach())

    attached = with_gradients(by(implementation, make))(*values)
    x, buffer, *others = (t.detach().requires_grad_() for t in values)
    out = by(implementation, detached)(x, buffer, *others)
    generator = torch.Generator().manual_seed(0)
    grad = (torch.randint(-8, 9, out.shape, generator=generator) / 4).to(out)
    dbuffer, *found = torch.autograd.grad(out, [buffer, x, *others], grad, allow_unused=True)
    assert dbuffer is None
    for actual, truth in zip(found, (attached[1], *attached[3:]), strict=True):
        assert torch.equal(actual, truth)


@each_implementation
def test_some_features_detached(implementation: str) -> None:
    x, buffer, *values = inputs()
    first, second, third = (f.clone().requires_grad_() for f in buffer.unbind(-2))
    out = by(implementation, lambda _: [first, second.detach(), third])(x, buffer, *values)
    dfirst, dthird = torch.autograd.grad(out.sum(), [first, third])
    _, _, dbuffer, *_ = with_ones(by(implementation))(x, buffer, *values)
    torch.testing.assert_close(torch.stack([dfirst, dthird]), dbuffer.movedim(-2, 0)[::2])


def with_ones(function: Function) -> Function:
    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = function(*leaves)
        return (out, *torch.autograd.grad(out.sum(), leaves))

    return run


@each_implementation
def test_fp32_stream_with_bf16_features_under_autocast(implementation: str) -> None:
    x, buffer, *values = inputs()
    for features in (FEATURES["buffer"], as_tokens):
        with torch.autocast(DEVICE, torch.bfloat16):
            ours = with_gradients(by(implementation, features))(x, buffer.bfloat16(), *values)
            plain = with_gradients(by("reference", features))(x, buffer.bfloat16(), *values)
        exact = with_gradients(by("reference", features))(
            *(t.double() for t in (x, buffer.bfloat16(), *values))
        )
        assert ours[0].dtype == torch.float32
        for our, their, truth in zip(ours, plain, exact, strict=True):
            assert our.dtype == their.dtype
            step = torch.finfo(torch.bfloat16).eps * truth.abs().max()
            assert (our - truth).abs().max() <= 2 * (their - truth).abs().max() + step


@each_implementation
@pytest.mark.parametrize("features", ["buffer", "tokens"])
def test_gradients_are_deterministic(features: str, implementation: str) -> None:
    run = with_gradients(by(implementation, FEATURES[features]))
    values = inputs(size=(3, 4), times=1)
    assert all(torch.equal(a, b) for a, b in zip(run(*values), run(*values), strict=True))


@each_implementation
@pytest.mark.parametrize("features", ["buffer", "tokens"])
def test_no_output_is_left_unwritten(
    features: str, poisoned_memory: None, implementation: str
) -> None:
    values = inputs(size=(3, 5), width=33, times=1)
    for result in with_gradients(by(implementation, FEATURES[features]))(*values):
        assert result.isfinite().all()


@pytest.mark.versions
@each_implementation
@pytest.mark.parametrize(
    ("features", "backend"), [("buffer", "inductor"), ("list", "aot_eager"), ("list", "inductor")]
)
def test_fullgraph_forward_and_backward_equal_eager(
    features: str, backend: str, implementation: str
) -> None:
    ours = by(implementation, FEATURES[features])
    graph = torch.compile(ours, fullgraph=True, backend=backend)
    eager = with_gradients(ours)(*inputs())
    for actual, truth in zip(with_gradients(graph)(*inputs()), eager, strict=True):
        torch.testing.assert_close(actual, truth)


def test_operators_pass_opcheck() -> None:
    fwd, bwd = (
        torch.ops.dimr_fast.upsample_add_fwd.triton,
        torch.ops.dimr_fast.upsample_add_bwd.triton,
    )
    x, projected = seeded(2, 4, 6, 24), seeded(2, 2, 3, 96)
    scale, shift = seeded(2, 24), seeded(1, 24)
    mean, rstd = seeded(2, 24), seeded(2, 24).abs()
    torch.library.opcheck(fwd, (x, projected, scale, shift))
    torch.library.opcheck(fwd, (x.bfloat16(), projected, shift, scale))
    torch.library.opcheck(bwd, (x, projected, scale, mean, rstd, 2))
    torch.library.opcheck(bwd, (x, projected.bfloat16(), shift, mean, rstd, 1))


@pytest.mark.versions
@needs_cpu
def test_compiled_operators_pass_opcheck() -> None:
    fwd, bwd = (
        torch.ops.dimr_fast.upsample_add_fwd.default,
        torch.ops.dimr_fast.upsample_add_bwd.default,
    )
    x, projected = seeded(2, 4, 6, 24), seeded(2, 2, 3, 96)
    scale, shift = seeded(2, 24), seeded(1, 24)
    mean, rstd = seeded(2, 24), seeded(2, 24).abs()
    torch.library.opcheck(fwd, (x, projected, scale, shift))
    torch.library.opcheck(fwd, (x.bfloat16(), projected, shift, scale))
    torch.library.opcheck(bwd, (x, projected, scale, mean, rstd, 2))
    torch.library.opcheck(bwd, (x, projected.bfloat16(), shift, mean, rstd, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(instruction_set: None, dtype: torch.dtype) -> None:
    for out in (24, 33, 64):
        ours, plain = with_gradients(by("cpu")), with_gradients(by("reference"))
        assert_as_accurate(ours, plain, *inputs(slots=4, width=17, out=out), dtype=dtype)


def test_results_do_not_depend_on_threads(instruction_set: None) -> None:
    """Only our operators are tested: the matrix products between them are PyTorch's."""
    x, projected, scale = seeded(2, 16, 18, 40), seeded(2, 8, 9, 160), seeded(2, 40)
    packets = torch.ops.dimr_fast

    def run() -> tuple[torch.Tensor, ...]:
        out, mean, rstd = packets.upsample_add_fwd.default(x, projected, scale, scale)
        grads = packets.upsample_add_bwd.default(x, projected, scale, mean, rstd, 1)
        return (out, mean, rstd, *grads)

    one, three = on_threads(1, run), on_threads(3, run)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@needs_cpu
@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("projected", lambda x, p, s, m: (x, p[..., 1:], s, m, m, 2)),
        ("dout", lambda x, p, s, m: (x[0], p, s, m, m, 2)),
        ("weight", lambda x, p, s, m: (x, p, s[:, 1:], m, m, 2)),
        ("mean", lambda x, p, s, m: (x, p, s, m[:, 1:], m, 2)),
        ("rstd", lambda x, p, s, m: (x, p, s, m, m.double(), 2)),
        ("times", lambda x, p, s, m: (x, p, s, m, m, 3)),
    ],
)
def test_the_bare_operator_refuses_what_it_cannot_read(argument: str, change: Any) -> None:
    arguments = change(seeded(2, 4, 6, 24), seeded(2, 2, 3, 96), seeded(2, 24), seeded(2, 24))
    with pytest.raises(RuntimeError, match=f"{argument}"):
        torch.ops.dimr_fast.upsample_add_bwd.default(*arguments)


X, BUFFER, SCALE_IN, SHIFT_IN, WEIGHT, BIAS, SCALE_OUT, SHIFT_OUT = inputs(times=1)


def call(
    features: Any = BUFFER,
    x: torch.Tensor = X,
    norm_in: tuple[torch.Tensor, torch.Tensor] = (SCALE_IN, SHIFT_IN),
    weight: torch.Tensor = WEIGHT,
    bias: torch.Tensor = BIAS,
    norm_out: tuple[torch.Tensor, torch.Tensor] = (SCALE_OUT, SHIFT_OUT),
) -> torch.Tensor:
    return ops.upsample_add(
        x,
        features,
        norm_in,
        weight,
        bias,
        norm_out,
        implementation="triton",
    )


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: call(X), r"features: got shape \(2, 4, 6, 24\)"),
    (lambda: call([BUFFER[..., 0, :], BUFFER[..., 1, :4]]), r"features\[1\]: got shape"),
    (lambda: call([BUFFER[..., 0, :].to("meta")]), r"features\[0\]: got device meta"),
    (lambda: call(BUFFER.bfloat16()), "weight: got dtype torch.float32"),
    (lambda: call(bias=BIAS.bfloat16()), "bias: got dtype torch.bfloat16"),
    (lambda: call(weight=WEIGHT.to("meta")), "weight: got device meta"),
    (lambda: call(norm_in=(SCALE_IN, SHIFT_IN.to("meta"))), "norm_in: got device meta"),
    (lambda: call(norm_out=(SCALE_OUT.to("meta"), SHIFT_OUT)), "norm_out: got device meta"),
    (
        lambda: call(BUFFER.double(), weight=WEIGHT.double(), bias=BIAS.double()),
        "features: got dty",
    ),
    (lambda: call(x=X.double()), "x is float64"),
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
    space = torch.empty(2 * far + 64, dtype=torch.float16, device=DEVICE)
    x, buffer, *values = (t.half() for t in inputs(1, (1, 3), q=1, width=8, out=16, slots=2))
    far_feature = space.as_strided((1, 1, 3, 8), (0, 0, far, 1)).copy_(buffer[..., 0, :])
    far_x = space[8:].as_strided((1, 1, 3, 16), (0, 0, far, 1)).copy_(x)

    def run(x: torch.Tensor, feature: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ours = by("triton", lambda f: [feature, f[..., 1, :]])
        return with_gradients(lambda *v: ours(x, buffer, *v))(*values)

    for actual, near in zip(run(far_x, far_feature), run(x, buffer[..., 0, :]), strict=True):
        torch.testing.assert_close(actual, near)
