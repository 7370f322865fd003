"""CUDA graphs of an optimised model, replaced by a fake where there is no GPU."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dimr_fast import DiMR, inference, optimize_for_inference
from dimr_fast.utils.cuda_graphs import GRAPHS, Compute
from tests.support.golden import CASES, Golden, relative_error
from tests.support.models import inputs_of, randomised

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def tiny() -> DiMR:
    return randomised(DiMR.from_preset("tiny"))


class FakeCapture:
    """Replaces a CUDA graph: replays a function on inputs of the same shapes and dtypes."""

    def __init__(self) -> None:
        self.captures: list[tuple[tuple[int, ...], ...]] = []
        self.replays = 0

    def __call__(self, function: Compute, inputs: Sequence[Tensor], pool: object) -> Compute:
        self.captures.append(tuple(tuple(tensor.shape) for tensor in inputs))
        static = [tensor.clone() for tensor in inputs]

        def replay(*inputs: Tensor) -> list[Tensor]:
            self.replays += 1
            for place, tensor in zip(static, inputs, strict=True):
                assert (place.shape, place.dtype) == (tensor.shape, tensor.dtype)
                place.copy_(tensor)
            return function(*static)

        return replay


def captured_by(capture: FakeCapture, model: DiMR) -> inference.InferenceDiMR:
    with torch.no_grad():
        return inference.InferenceDiMR(model, torch.bfloat16, True, capture)


def test_graphs_are_captured_once_a_shape_and_predict_the_same(tiny: DiMR) -> None:
    capture = FakeCapture()
    optimised, eager = captured_by(capture, tiny), optimize_for_inference(tiny)
    calls = [(2, 2), (2, 1), (3, 1), (2, 2), (3, 1)]
    for batch, times in calls:
        inputs = inputs_of(tiny, batch, times)
        inputs["x"] += len(capture.captures)
        for output, wanted in zip(optimised(**inputs), eager(**inputs), strict=True):
            assert torch.equal(output, wanted)
    assert len(capture.captures) == 3
    inputs = inputs_of(tiny, 2)
    optimised(**inputs, last_only=True)
    optimised(**{**inputs, "x": inputs["x"].bfloat16()})
    optimised(**{**inputs, "y": inputs["y"].int()})
    assert len(capture.captures) == 6
    assert capture.replays == len(calls) + 3
    optimised(**inputs_of(tiny, 0))
    assert capture.replays == len(calls) + 3


def test_the_least_recently_used_graph_makes_room(tiny: DiMR) -> None:
    capture = FakeCapture()
    optimised, eager = captured_by(capture, tiny), optimize_for_inference(tiny)

    def captures(batch: int) -> int:
        inputs = inputs_of(tiny, batch)
        for output, wanted in zip(optimised(**inputs), eager(**inputs), strict=True):
            assert torch.equal(output, wanted)
        return len(capture.captures)

    first = range(1, GRAPHS + 1)
    assert [captures(batch) for batch in first] == [*first]
    assert captures(1) == GRAPHS
    assert captures(GRAPHS + 1) == GRAPHS + 1
    assert captures(1) == GRAPHS + 1
    assert captures(2) == GRAPHS + 2


needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=needs_gpu, id=str(dtype)) for dtype in DTYPES]
)
def test_graphs_on_a_gpu_replay_what_runs_without(dtype: torch.dtype) -> None:
    model = randomised(DiMR.from_preset("tiny")).cuda()
    replayed = optimize_for_inference(model, dtype)
    eager = optimize_for_inference(model, dtype, cuda_graphs=False)
    assert replayed.cuda_graphs
    assert not eager.cuda_graphs
    kept = []
    for seed, (batch, times) in enumerate([(2, 2), (3, 1), (2, 2), (0, 1), (2, 1), (3, 1)]):
        inputs = {name: value.cuda() for name, value in inputs_of(model, batch, times).items()}
        inputs["x"] += seed
        kept.append((replayed(**inputs), eager(**inputs)))
    torch.cuda.synchronize()
    for ours, theirs in kept:
        for output, wanted in zip(ours, theirs, strict=True):
            assert torch.equal(output, wanted)


@pytest.mark.parametrize("case", [pytest.param(case, marks=needs_gpu) for case in CASES])
def test_graphs_on_a_gpu_equal_the_published_model(case: str) -> None:
    torch.backends.cudnn.allow_tf32 = False
    golden = Golden(case)
    model = DiMR(golden.config).cuda()
    model.load_state_dict(golden.under("param/"), strict=True)
    optimised = optimize_for_inference(model, torch.float32, cuda_graphs=True)
    x, log_snr, y = (golden[f"in/{name}"].cuda() for name in ("x", "time", "y"))
    for _ in range(2):
        for i, output in enumerate(optimised(x, log_snr=log_snr, y=y)):
            assert relative_error(output.cpu(), golden[f"mixed_time/out/{i}"]) < 1e-5
