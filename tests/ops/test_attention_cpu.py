"""`attention` by the compiled CPU library, against the reference."""

from collections.abc import Callable

import pytest
import torch

from dimr_fast import ops, reference
from tests.support.cpu_library import needs_cpu, on_threads
from tests.support.oracle import assert_as_accurate, seeded, with_gradients

pytestmark = needs_cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

Function = Callable[[torch.Tensor], torch.Tensor]


def by(implementation: str, heads: int) -> Function:
    return lambda qkv: ops.attention(qkv, heads, implementation=implementation)


def plain(heads: int) -> Function:
    return lambda qkv: reference.attention(qkv, heads)


def packed(images: int, tokens: int, heads: int, head_dim: int) -> torch.Tensor:
    return seeded(images, tokens, 3 * heads * head_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("images", "tokens", "heads", "head_dim"),
    [
        (2, 65, 4, 36),  # demo
        (1, 257, 4, 60),  # XL/2R
        (1, 257, 2, 72),  # G/2R
        (1, 257, 2, 64),  # M/3R
        (3, 1, 2, 5),
        (2, 6, 1, 17),
        (1, 7, 3, 1),
        (1, 70, 1, 130),
    ],
)
def test_every_instruction_set(
    instruction_set: str,
    images: int,
    tokens: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    """Sizes are those of the presets, or around the widths of a register tile."""
    qkv = packed(images, tokens, heads, head_dim)
    assert_as_accurate(by("cpu", heads), plain(heads), qkv, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype: torch.dtype) -> None:
    qkv = packed(2, 33, 4, 12)
    ours, theirs = with_gradients(by("cpu", 4)), with_gradients(plain(4))
    assert_as_accurate(ours, theirs, qkv, dtype=dtype)


def test_no_tokens_and_no_images() -> None:
    for shape in ((0, 5, 36), (2, 0, 36)):
        qkv = torch.zeros(shape, requires_grad=True)
        out = by("cpu", 2)(qkv)
        assert out.shape == (*shape[:2], 12)
        (grad,) = torch.autograd.grad(out.sum(), qkv)
        assert grad.shape == shape


LAYOUTS: dict[str, Function] = {
    "sliced tokens": lambda x: x[:, 1:],
    "images and tokens exchanged": lambda x: x.transpose(0, 1),
    "every other image": lambda x: x[::2],
    "columns permuted": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": lambda x: x[:1].expand(3, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str) -> None:
    qkv = LAYOUTS[layout](packed(4, 9, 2, 12))
    assert torch.equal(by("cpu", 2)(qkv), by("cpu", 2)(qkv.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    qkv = packed(1, 257, 3, 60).to(dtype)
    results = [on_threads(count, lambda: (by("cpu", 3)(qkv),))[0] for count in (1, 2, 5)]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    """Scores of thousands: the largest is subtracted before the exponential."""
    qkv = 40 * packed(1, 20, 2, 16)
    assert_as_accurate(by("cpu", 2), plain(2), qkv, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_the_outputs_that_depend_on_it(dtype: torch.dtype) -> None:
    qkv = packed(2, 9, 2, 8).to(dtype)
    qkv[0, 3, 2 * 16 + 8] = torch.nan  # a value of the second head
    qkv[1, 5, 0] = torch.nan  # a query of the first head
    out = by("cpu", 2)(qkv).unflatten(-1, (2, 8))
    assert out[0, :, 1, 0].isnan().all()
    assert out[0, :, 0].isfinite().all()
    assert out[1, 5, 0].isnan().all()
    assert out[1, 6, 0].isfinite().all()


def test_statistics_are_those_of_the_scores() -> None:
    qkv = packed(2, 19, 3, 12)
    _, statistics = torch.ops.dimr_fast.attention_fwd.default(qkv, 3)
    q, k, _ = qkv.double().unflatten(-1, (3, 3, 12)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT) * 12**-0.5 / torch.log(torch.tensor(2.0, dtype=torch.float64))
    top = scores.amax(-1)
    share = 1 / (scores - top[..., None]).exp2().sum(-1)
    torch.testing.assert_close(
        statistics.double(), torch.stack([top, share], 2), rtol=1e-5, atol=1e-5
    )


def test_opcheck() -> None:
    qkv = packed(2, 9, 2, 8)
    torch.library.opcheck(torch.ops.dimr_fast.attention_fwd.default, (qkv, 2))


def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    qkv = packed(2, 9, 2, 8).bfloat16()
    run = torch.compile(by("auto", 2), fullgraph=True, backend="aot_eager")
    actual, expected = with_gradients(run)(qkv), with_gradients(by("auto", 2))(qkv)
    torch.testing.assert_close(actual, expected)
