"""The norms of the compiled CPU library: tests in addition to those of each operator."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dimr_fast import _extension, ops
from tests.support.cpu_library import on_threads
from tests.support.oracle import Function, assert_as_accurate, with_gradients

NO_LIBRARY = _extension.why_not("cpu")
pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=f"cpu library: {NO_LIBRARY}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(scope="module", params=["td_rms_norm", "td_layer_norm"])
def operator(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def ours(operator: str) -> Function:
    return by(operator, "cpu")


@pytest.fixture(scope="module")
def plain(operator: str) -> Function:
    return by(operator, "reference")


def by(operator: str, implementation: str) -> Function:
    """Return the operator as a function of x, residual and its values at each time."""

    def run(x: torch.Tensor, residual: torch.Tensor | None, *values: torch.Tensor) -> Any:
        function = getattr(ops, operator)
        return function(x, *values, residual, implementation=implementation)

    return run


def values(operator: str, times: int, width: int) -> list[torch.Tensor]:
    scale = seeded(times, width)
    return [scale] if operator == "td_rms_norm" else [scale, seeded(times, width).flip(1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(2, 9, 960), (2, 5, 255), (3, 40, 33), (2, 3, 5, 31), (2, 19, 17), (1, 1, 64)],
    ids=str,
)
def test_every_instruction_set(
    instruction_set: str,
    operator: str,
    ours: Function,
    plain: Function,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    inputs = 3 * seeded(*shape) + 1, seeded(*shape).flip(0), *values(operator, 1, shape[-1])
    ours, plain = with_gradients(ours), with_gradients(plain)
    assert_as_accurate(ours, plain, *inputs, dtype=dtype)
    assert_as_accurate(ours, plain, inputs[0], None, *inputs[2:], dtype=dtype)


@pytest.mark.parametrize("width", [480, 240, 192, 32, 66816])
@pytest.mark.parametrize("times", ["per image", "shared"])
def test_widths_of_the_presets(
    operator: str, ours: Function, plain: Function, width: int, times: str
) -> None:
    inputs = seeded(3, 4, width), seeded(3, 4, width).flip(0)
    inputs = *inputs, *values(operator, 3 if times == "per image" else 1, width)
    for dtype in DTYPES:
        assert_as_accurate(with_gradients(ours), with_gradients(plain), *inputs, dtype=dtype)


@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_mixed_dtypes(
    operator: str,
    ours: Function,
    plain: Function,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    values_dtype: torch.dtype,
) -> None:
    """The truth is the reference in fp64 on the same quantised inputs."""
    x, residual = seeded(2, 7, 50).to(x_dtype), seeded(2, 7, 50).flip(0).to(residual_dtype)
    inputs = x, residual, *(v.to(values_dtype) for v in values(operator, 2, 50))
    exact = with_gradients(plain)(*(t.double() for t in inputs))
    results = zip(with_gradients(ours)(*inputs), with_gradients(plain)(*inputs), exact, strict=True)
    for our, their, truth in results:
        assert our.dtype == their.dtype
        step = torch.finfo(our.dtype).eps * truth.abs().max()
        allowed = 2 * (their.double() - truth).abs().max() + step
        assert (our.double() - truth).abs().max() <= allowed


def test_the_number_of_threads_changes_no_bit(operator: str, ours: Function) -> None:
    inputs = seeded(3, 700, 80), seeded(3, 700, 80).flip(0), *values(operator, 3, 80)
    results = [on_threads(count, lambda: with_gradients(ours)(*inputs)) for count in (1, 2, 5)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows that do not collapse": lambda x: x[:, :, :3],
    "axes permuted": lambda x: x.permute(0, 2, 1, 3),
    "columns permuted": lambda x: x.permute(0, 3, 1, 2),
    "sliced channels": lambda x: x[..., 5:20],
    "every other image": lambda x: x[::2],
    "one row, expanded": lambda x: x[:, :1, :1].expand(-1, 3, 2, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(
    operator: str, ours: Function, plain: Function, layout: str, dtype: torch.dtype
) -> None:
    arrange = LAYOUTS[layout]
    x, residual = seeded(4, 5, 6, 24), seeded(4, 5, 6, 24).flip(0)
    others = values(operator, 1, arrange(x).shape[-1])

    def on(function: Function) -> Function:
        return lambda x, residual, *v: function(arrange(x), arrange(residual), *v)

    assert_as_accurate(
        with_gradients(on(ours)), with_gradients(on(plain)), x, residual, *others, dtype=dtype
    )


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (0, 8)], ids=str)
def test_nothing_to_norm(operator: str, ours: Function, shape: tuple[int, ...]) -> None:
    x, residual = torch.zeros(shape), torch.zeros(shape)
    found = with_gradients(ours)(x, residual, *values(operator, 1, 8))
    assert [t.shape for t in found[:2]] == [x.shape, x.shape]
    assert not any(t.any() for t in found)


def test_auto_is_the_compiled_one(operator: str, ours: Function) -> None:
    inputs = seeded(2, 5, 24), seeded(2, 5, 24).flip(0), *values(operator, 2, 24)
    assert ops.OPERATORS[operator].select("auto", inputs[0]) == "cpu"
    for a, b in zip(by(operator, "auto")(*inputs), ours(*inputs), strict=True):
        assert torch.equal(a, b)


def test_inference_mode(operator: str, ours: Function) -> None:
    inputs = seeded(2, 5, 24), seeded(2, 5, 24).flip(0), *values(operator, 2, 24)
    with torch.inference_mode():
        found = ours(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, ours(*inputs), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), [(5, 32), (3, 33), (40, 8), (2, 960)])
def test_a_row_in_pieces_is_their_concatenation(
    instruction_set: str, count: int, width: int, dtype: torch.dtype
) -> None:
    buffer = seeded(2, 3, 4, count + 1, width).to(dtype)
    pieces = list(buffer.unbind(-2))[1:]
    row = torch.cat(pieces, -1)
    weight, bias = seeded(2, count * width), seeded(1, count * width)
    fwd = torch.ops.dimr_fast.td_layer_norm_fwd.default
    bwd = torch.ops.dimr_fast.td_layer_norm_bwd.default
    _, y, *saved = fwd(weight, bias, pieces, None, dtype)
    assert_as_accurate(
        lambda *p: fwd(weight, bias, list(p), None, dtype)[1],
        lambda *p: ops.td_layer_norm(torch.cat(p, -1), weight, bias, implementation="reference"),
        *pieces,
        dtype=dtype,
    )
    dy = seeded(*row.shape).flip(0).to(dtype)
    dx, both, again = bwd(dy, None, pieces, weight, bias, *saved, True, True)
    whole, expected, _ = bwd(dy, None, [row], weight, bias, *saved, True, False)
    whole = torch.stack(whole[0].unflatten(-1, (count, width)).unbind(-2))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(dx, whole, rtol=2 * eps, atol=1e-5)
    torch.testing.assert_close(both, expected)
    torch.testing.assert_close(again, y, rtol=2 * eps, atol=1e-5)
    none, alone, nothing = bwd(dy, None, pieces, weight, bias, *saved, False, False)
    assert none.numel() == nothing.numel() == 0
    assert torch.equal(alone, both)


X, ROWS = torch.zeros(2, 5, 6), torch.zeros(2, 5)
ONE, F32 = torch.ones(1, 6), torch.float32
PACKETS = torch.ops.dimr_fast

BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: PACKETS.td_rms_norm_fwd.default(X[0, 0], None, ONE, F32), "x: "),
    (lambda: PACKETS.td_rms_norm_fwd.default(X.double(), None, ONE, F32), "x: "),
    (lambda: PACKETS.td_rms_norm_fwd.default(X, X[1:], ONE, F32), "residual: "),
    (lambda: PACKETS.td_rms_norm_fwd.default(X, X.int(), ONE, F32), "residual: "),
    (lambda: PACKETS.td_rms_norm_fwd.default(X, None, ONE[0], F32), "scale: "),
    (lambda: PACKETS.td_rms_norm_fwd.default(X, None, ONE[:, 1:], F32), "scale: "),
    (lambda: PACKETS.td_rms_norm_fwd.default(X, None, ONE.expand(3, 6), F32), "scale: "),
    (lambda: PACKETS.td_rms_norm_fwd.default(X, None, ONE, torch.int32), "output: "),
    (lambda: PACKETS.td_rms_norm_bwd.default(X[:, 1:], None, X, ONE, ROWS, True), "dy: "),
    (lambda: PACKETS.td_rms_norm_bwd.default(X, X.half(), X, ONE, ROWS, True), "dsum: "),
    (lambda: PACKETS.td_rms_norm_bwd.default(X, None, X, ONE, ROWS[:, 1:], True), "rms: "),
    (lambda: PACKETS.td_layer_norm_fwd.default(ONE, ONE, [], None, F32), "pieces: "),
    (lambda: PACKETS.td_layer_norm_fwd.default(ONE, ONE, [X[..., 3:], X], None, F32), "pieces: "),
    (lambda: PACKETS.td_layer_norm_fwd.default(ONE, ONE, [X, X.half()], None, F32), "pieces: "),
    (lambda: PACKETS.td_layer_norm_fwd.default(ONE, ONE, [X, X], None, F32), "weight: "),
    (lambda: PACKETS.td_layer_norm_fwd.default(ONE, ONE[0], [X], None, F32), "bias: "),
    (
        lambda: PACKETS.td_layer_norm_fwd.default(
            ONE, ONE, [X[..., :3], X[..., 3:]], X[..., :3], F32
        ),
        "residual: ",
    ),
    (
        lambda: PACKETS.td_layer_norm_bwd.default(
            X[..., 1:], None, [X], ONE, ONE, ROWS, ROWS, True, True
        ),
        "dy: ",
    ),
    (
        lambda: PACKETS.td_layer_norm_bwd.default(
            X, None, [X], ONE, ONE, ROWS.half(), ROWS, True, True
        ),
        "mean: ",
    ),
    (
        lambda: PACKETS.td_layer_norm_bwd.default(X, X[1:], [X], ONE, ONE, ROWS, ROWS, True, True),
        "dsum: ",
    ),
]


@pytest.mark.parametrize(("call", "argument"), BAD)
def test_the_bare_operators_refuse_what_they_cannot_read(
    call: Callable[[], Any], argument: str
) -> None:
    with pytest.raises(RuntimeError, match=argument):
        call()
