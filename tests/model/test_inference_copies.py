"""Copies and pickles of optimised models, and models in wrappers."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from dimr_fast import DiMR, inference, optimize_for_inference
from tests.model.test_inference_graphs import FakeCapture, captured_by
from tests.support.models import inputs_of, randomised

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def tiny() -> DiMR:
    return randomised(DiMR.from_preset("tiny"))


def same(a: inference.InferenceDiMR, b: inference.InferenceDiMR, model: DiMR) -> bool:
    inputs = inputs_of(model, 3)
    pairs = zip(a(**inputs), b(**inputs), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("used", [False, True])
def test_an_optimised_model_is_copied_and_pickled(
    tiny: DiMR, dtype: torch.dtype, used: bool
) -> None:
    """Weights in oneDNN's layout cannot be copied as they are."""
    optimised = optimize_for_inference(tiny, dtype)
    if used:
        optimised(**inputs_of(tiny, 64))
    pickled = pickle.dumps(optimised)
    # Neither buffers nor a second copy of the weights.
    size = sum(p.numel() * p.element_size() for p in optimised.parameters())
    assert len(pickled) < size + 100_000
    for other in (copy.deepcopy(optimised), pickle.loads(pickled)):
        assert same(other, optimised, tiny)
        assert not other.training
        # They share nothing.
        with torch.no_grad():
            other.td_vectors.add_(0.5)
        assert not same(other, optimised, tiny)


def test_a_copy_captures_graphs_of_its_own(tiny: DiMR) -> None:
    capture = FakeCapture()
    optimised = captured_by(capture, tiny)
    optimised(**inputs_of(tiny, 2))
    other = copy.deepcopy(optimised)
    assert other.cuda_graphs
    assert same(other, optimised, tiny)
    with torch.no_grad():
        other.td_vectors.add_(0.5)
    assert not same(other, optimised, tiny)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        lambda model: torch.compile(nn.DataParallel(model)),
        torch.optim.swa_utils.AveragedModel,
    ],
)
def test_a_model_in_a_wrapper_is_optimised(tiny: DiMR, wrap: object) -> None:
    assert callable(wrap)
    expected = optimize_for_inference(tiny)
    assert same(optimize_for_inference(wrap(tiny)), expected, tiny)


def test_a_model_in_ddp_is_optimised(tiny: DiMR, tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(tiny)
        assert same(optimize_for_inference(wrapped), optimize_for_inference(tiny), tiny)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("other", [nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2)), None])
def test_another_model_is_refused(other: object) -> None:
    with pytest.raises(TypeError, match=r"model: got .*, expected a DiMR"):
        optimize_for_inference(other)  # type: ignore[arg-type]
