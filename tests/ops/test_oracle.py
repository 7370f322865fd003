"""The accuracy rule of all kernels: what it accepts and what it rejects."""

import pytest
import torch

from tests.support.oracle import SAMPLES, assert_as_accurate, largest_error, neighbour, seeded


def exceeds_twice(numbers: int, samples: int) -> float:
    """Return how often the largest of `numbers` errors exceeds twice that of `samples` errors."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        torch.randn(40_000, count, generator=generator).abs().amax(1)
        for count in (numbers, samples)
    )
    return float((ours > 2 * theirs).double().mean())


def test_frequencies_of_wrong_verdicts_on_few_numbers() -> None:
    """The frequencies that `SAMPLES` states."""
    assert exceeds_twice(4, 4) == pytest.approx(1 / 9, rel=0.1)
    assert exceeds_twice(SAMPLES, SAMPLES) == pytest.approx(1 / 800, rel=0.3)
    assert exceeds_twice(4, SAMPLES) < 1 / 5000


def sums(x: torch.Tensor) -> torch.Tensor:
    """Four sums over many numbers, each partial sum rounded to the dtype of `x`."""
    total = torch.zeros(4, dtype=x.dtype, device=x.device)
    for row in x.unflatten(0, (-1, 4)):
        total = total + row
    return total


def with_error(of: float):
    """`sums` with errors of this size relative to the largest sum, of either sign."""

    def run(x: torch.Tensor) -> torch.Tensor:
        exact = sums(x.double())
        signs = torch.tensor([1, -1, 1, -1], device=x.device)
        return (exact + of * exact.abs().max() * signs).to(x.dtype)

    return run


def reversed_sums(x: torch.Tensor) -> torch.Tensor:
    """`sums` in the opposite order: as accurate, with other rounding errors."""
    return sums(x.unflatten(0, (-1, 4)).flip(0).flatten())


X = [torch.randn(400, generator=torch.Generator().manual_seed(seed)) for seed in range(40)]


def test_an_accurate_kernel_passes_where_the_reference_happens_to_be_exact() -> None:
    refused_by_one_run = 0
    for x in X:
        assert_as_accurate(reversed_sums, sums, x, dtype=torch.bfloat16)
        quantised = x.bfloat16()
        truth = sums(quantised.double())
        ours, theirs = (largest_error(f(quantised), truth) for f in (reversed_sums, sums))
        step = torch.finfo(torch.bfloat16).eps * truth.abs().max()
        refused_by_one_run += bool(ours > 2 * theirs + step)
    assert refused_by_one_run > 0


@pytest.mark.parametrize("x", X[:4])
def test_too_large_errors_of_few_numbers_are_rejected(x: torch.Tensor) -> None:
    quantised = x.bfloat16()
    worst = max(
        float(largest_error(sums(near), sums(near.double())) / sums(near.double()).abs().max())
        for near in (neighbour(quantised, seed) for seed in range(-1 + SAMPLES // 4))
    )
    step = torch.finfo(torch.bfloat16).eps
    with pytest.raises(AssertionError, match="output 0: error"):
        assert_as_accurate(with_error(2 * worst + 4 * step), sums, x, dtype=torch.bfloat16)


def test_many_numbers_are_judged_by_one_run_of_the_reference() -> None:
    runs = []

    def reference(x: torch.Tensor) -> torch.Tensor:
        runs.append(x.dtype)
        return x * 3 if x.dtype == torch.float64 else x + x + x

    with pytest.raises(AssertionError, match="sum: error"):
        assert_as_accurate(
            lambda x: x * 3.5, reference, seeded(SAMPLES), dtype=torch.bfloat16, names=["sum"]
        )
    assert len(runs) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_neighbours_are_one_rounding_step_away(dtype: torch.dtype) -> None:
    x = seeded(1000).to(dtype)
    near = neighbour(x, 3)
    assert (near > x).any()
    assert (near < x).any()
    assert (near == x).any()
    apart = (near.double() - x.double()).abs()
    step = torch.finfo(dtype).eps * torch.exp2(x.double().abs().log2().floor())
    assert (apart <= step).all()
    assert torch.equal(near, neighbour(x, 3))
    assert not torch.equal(near, neighbour(x, 4))
    assert neighbour(torch.arange(3), 0).equal(torch.arange(3))
    assert neighbour(None, 0) is None
