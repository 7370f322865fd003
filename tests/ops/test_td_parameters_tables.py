"""The tables of addresses that the Triton kernels of `td_parameters` read."""

from typing import Any

import pytest
import torch

from tests.support.oracle import seeded, skip_module_without_triton, with_gradients
from tests.support.td_parameters import by, times, vectors_of

skip_module_without_triton()


@pytest.fixture
def tables() -> dict[Any, torch.Tensor]:
    """The tables of this process, none at first."""
    from dimr_fast.kernels.td_parameters import TABLES

    TABLES.kept.clear()
    return TABLES.kept


def test_a_table_is_built_once_for_the_same_tensors(tables: dict[Any, torch.Tensor]) -> None:
    vectors = vectors_of(24, 8)
    for count in (2, 3, 5):
        with_gradients(by("triton", times(count)))(*vectors)
    assert len(tables) == 2, "one of forward and, in blocks of another size, one of backward"


def test_a_table_serves_whatever_lies_at_its_addresses(tables: dict[Any, torch.Tensor]) -> None:
    """A tensor at the address of a freed one may have other values or a dtype of the same size."""
    halves = [v.half() for v in vectors_of(24, 8)]
    for dtype in (torch.float16, torch.bfloat16, torch.float16):
        vectors = [v.view(dtype).copy_(seeded(v.shape[0]) + i) for i, v in enumerate(halves)]
        expected = by("reference", times(2))(*[v.float() for v in vectors])
        for actual, truth in zip(by("triton", times(2))(*vectors), expected, strict=True):
            torch.testing.assert_close(actual, truth)
    assert len(tables) == 1


def test_the_least_recently_used_table_makes_room(tables: dict[Any, torch.Tensor]) -> None:
    from dimr_fast.kernels.td_parameters import TABLES

    def call(vectors: list[torch.Tensor]) -> torch.Tensor:
        by("triton", times(1))(*vectors)
        return next(reversed(tables.values()))

    limit = TABLES.limit
    assert limit >= 128
    alive = [vectors_of(3) for _ in range(limit + 40)]
    built = [call(vectors) for vectors in alive[:limit]]
    assert call(alive[0]) is built[0], "used again, and so not the next to go"
    built += [call(vectors) for vectors in alive[limit:]]
    assert [id(table) for table in tables.values()] == [
        id(table) for table in (*built[41:limit], built[0], *built[limit:])
    ]


def test_a_capture_finds_the_tables_of_its_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake GPU: 80 sets forward and backward after 80 other ones, then a capture."""
    from dimr_fast.kernels.td_parameters import Tables

    class OnGpu:
        is_cuda = True

    capturing = False

    def build(*key: Any) -> Any:
        assert not capturing, "a copy to the device waits, which a capture forbids"
        return OnGpu()

    tables = Tables(build)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    others, ours = ([vectors_of(3) for _ in range(80)] for _ in range(2))

    def run(sets: list[list[torch.Tensor]]) -> set[Any]:
        kinds = [[[kind] for kind in vectors] for vectors in sets]
        return {tables.of(kind, block)[0] for kind in kinds for block in (128, 256)}

    run(others)
    warm = run(ours)
    assert not tables.captured
    capturing = True
    assert run(ours) == warm
    assert tables.captured == warm
    capturing = False
    run([vectors_of(3 + i) for i in range(tables.limit)])
    assert not warm & set(tables.kept.values()), "evicted since"
    assert tables.captured == warm, "but a graph may be replayed still"
