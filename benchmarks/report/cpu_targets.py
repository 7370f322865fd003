"""State the targets for a CPU; `gpu/targets.py` has those for a GPU."""

from collections.abc import Callable, Iterator

from benchmarks.report.results import Group, ModelResults
from benchmarks.utils.names import (
    BF16,
    FORWARD,
    FP32,
    OURS,
    OURS_INT8,
    PUBLISHED,
    PUBLISHED_COMPILED,
    PUBLISHED_NO_CHECKPOINTING,
    REFERENCE_COMPILED,
    TRAINING,
)
from benchmarks.utils.spread import Spread
from benchmarks.utils.targets import Target

Measure = Callable[[ModelResults], Iterator[Spread]]
XL = Group("XL/2R", FORWARD, 1, BF16)
SMALL_TRAINING = Group("demo-size", TRAINING, 64, BF16)


def speedup(
    group: Group, provider: str, their_dtype: str | None = None, ours_is: str = OURS
) -> Measure:
    """Return a function that yields the speedup over a provider, in another dtype if given."""

    def measure(results: ModelResults) -> Iterator[Spread]:
        ours = results.find(group, ours_is)
        theirs = results.find(group._replace(dtype=their_dtype or group.dtype), provider)
        if ours and theirs:
            yield theirs.seconds / ours.seconds

    return measure


def gemm_share(group: Group) -> Measure:
    """Return a function that yields the per cent of a linear layer's rate that we reach."""

    def measure(results: ModelResults) -> Iterator[Spread]:
        if ours := results.find(group, OURS):
            yield ours.gemm_share

    return measure


def compiled(preset: str, batch: int, dtype: str = BF16, ours_is: str = OURS) -> Measure:
    """Return a function that yields the speedup of sampling over the compiled reference."""
    return speedup(Group(preset, FORWARD, batch, dtype), REFERENCE_COMPILED, ours_is=ours_is)


TARGETS = (
    Target("demo, batch 1, bf16, against the compiled reference", 1.3, 2, compiled("demo", 1)),
    Target("demo, batch 32, bf16, against it", 1.3, 2, compiled("demo", 32)),
    Target("demo, batch 1, fp32, against it", 1.15, 2, compiled("demo", 1, FP32)),
    Target("demo, batch 32, fp32, against it", 1.15, 2, compiled("demo", 32, FP32)),
    Target("XL/2R, batch 1, bf16, against it", 1.5, 2, compiled("XL/2R", 1)),
    Target("XL/2R, batch 4, bf16, against it", 1.5, 2, compiled("XL/2R", 4)),
    Target(
        "demo, batch 32, int8, against it in bf16",
        1.5,
        2,
        compiled("demo", 32, ours_is=OURS_INT8),
    ),
    Target(
        "XL/2R, batch 1, int8, against it in bf16",
        2.2,
        3,
        compiled("XL/2R", 1, ours_is=OURS_INT8),
    ),
    Target(
        "XL/2R, batch 1, int8, against published bf16 autocast",
        4.5,
        6,
        speedup(XL, PUBLISHED, ours_is=OURS_INT8),
    ),
    Target(
        "XL/2R, bf16, against published bf16 autocast",
        2.5,
        4,
        speedup(XL, PUBLISHED),
        predicted=1.6,
    ),
    Target("XL/2R, bf16, against published fp32", 6, 10, speedup(XL, PUBLISHED, FP32), "×", 2.3),
    Target("XL/2R, share of the bf16 linear rate", 30, 50, gemm_share(XL), " %", 80),
    Target(
        "demo-size training against published without checkpointing",
        3,
        5,
        speedup(SMALL_TRAINING, PUBLISHED_NO_CHECKPOINTING),
        predicted=3,
    ),
    Target(
        "demo-size training against torch.compile of it",
        2.2,
        2.5,
        speedup(SMALL_TRAINING, PUBLISHED_COMPILED),
        predicted=2.5,
    ),
    Target(
        "demo-size training against torch.compile of the reference",
        1.5,
        2,
        speedup(SMALL_TRAINING, REFERENCE_COMPILED),
    ),
)
