"""Calls of the CPU library that run several operators equal the same operators one by one."""

import pytest
import torch

from dimr_fast import DiMR, ops, optimize_for_inference
from tests.support.cpu_library import needs_cpu
from tests.support.models import randomised
from tests.support.oracle import seeded

pytestmark = needs_cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = ["TDRMSN", "LN", "RMSN"]


def model(norm_type: str = "TDRMSN", implementation: str = "auto") -> DiMR:
    torch.manual_seed(0)
    found = DiMR.from_preset("tiny", norm_type=norm_type)
    return randomised(found).set_implementation(implementation)


def inputs(batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 3, 16, 16, generator=generator)
    return {
        "x": x,
        "log_snr": torch.linspace(-3, 3, batch),
        "y": torch.arange(batch) % 7,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_type", NORMS)
def test_one_call_equals_block_by_block(
    instruction_set: str, norm_type: str, dtype: torch.dtype
) -> None:
    source = model(norm_type)
    together, singly = (optimize_for_inference(source, dtype) for _ in range(2))
    assert all(branch.in_one_call for branch in together.stages)
    for branch in singly.stages:
        branch.in_one_call = False
    # The buffers are allocated for 3 images; for 2 they are a part of them.
    for batch in (3, 2, 0):
        results = zip(together(**inputs(batch)), singly(**inputs(batch)), strict=True)
        assert all(torch.equal(a, b) for a, b in results)


def test_one_time_for_all_images() -> None:
    fast = optimize_for_inference(model(), torch.float32)
    given = inputs(3)
    given["log_snr"] = torch.tensor([0.5])
    expected = fast(**given | {"log_snr": torch.full((3,), 0.5)})
    torch.testing.assert_close(fast(**given), expected)


def test_a_named_implementation_runs_block_by_block() -> None:
    fast = optimize_for_inference(model(implementation="reference"), torch.float32)
    assert not any(branch.in_one_call for branch in fast.stages)
    expected = optimize_for_inference(model(), torch.float32)(**inputs(2))
    torch.testing.assert_close(fast(**inputs(2)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [0, 3, 9])
def test_a_wrong_number_of_parameters_is_refused(count: int) -> None:
    x, pairs = torch.zeros(1, 4, 8), torch.zeros(0, 1, 4, 2, 8)
    parameters = [torch.zeros(8, 1, 3, 3), torch.zeros(8), torch.zeros(32, 8), torch.zeros(32)]
    parameters += [torch.zeros(8, 16), torch.zeros(8)]

    def run(given: list[torch.Tensor]) -> torch.Tensor:
        scale = [torch.ones(1, 8)]
        options = {"heads": 0, "height": 2, "layer_norm": False, "packed": False}
        return ops.branch_blocks(x, pairs, scale, given, **options)

    assert torch.equal(run(parameters), x)
    with pytest.raises(RuntimeError, match="parameters: "):
        run((2 * parameters)[:count])


@pytest.mark.parametrize(
    ("height", "dtype", "message"),
    [(0, torch.float32, "height: "), (3, torch.float32, "height: "), (2, torch.bfloat16, "dtype")],
)
def test_a_wrong_height_or_dtype_is_refused(height: int, dtype: torch.dtype, message: str) -> None:
    x, pairs = torch.zeros(1, 4, 8), torch.zeros(0, 1, 4, 2, 8, dtype=dtype)
    with pytest.raises(RuntimeError, match=message):
        ops.branch_blocks(x, pairs, [], [], heads=0, height=height, layer_norm=False, packed=False)


def test_wrong_buffers_are_refused() -> None:
    x = torch.zeros(1, 4, 8)
    for pairs in (torch.zeros(1, 2, 4, 2, 8), torch.zeros(1, 1, 4, 1, 8), torch.zeros(1, 4, 2, 8)):
        with pytest.raises(RuntimeError, match="pairs: "):
            ops.branch_blocks(x, pairs, [], [], heads=1, height=0, layer_norm=False, packed=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cascade_in_one_call(instruction_set: str, dtype: torch.dtype) -> None:
    x, features = seeded(2, 4, 6, 8).to(dtype), [seeded(2, 2, 3, 5).to(dtype) for _ in range(3)]
    values = [seeded(2, 15), seeded(1, 15), seeded(2, 8), seeded(2, 8).flip(0)]
    weight, bias = seeded(32, 15).to(dtype), seeded(32).to(dtype)
    arguments = x, features, values[:2], weight, bias, values[2:]
    expected = ops.upsample_add(*arguments, implementation="cpu")
    # The linear layer is the same one of PyTorch, called for the same rows.
    found = ops.upsample_add_no_grad(*arguments, packed=False)
    torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_wrong_number_of_values_is_refused() -> None:
    x, features = torch.zeros(1, 2, 2, 4), [torch.zeros(1, 1, 1, 3)]
    with pytest.raises(RuntimeError, match="values: expected 4, got 3"):
        torch.ops.dimr_fast.upsample_add_no_grad(
            x, features, 3 * [torch.zeros(1, 3)], torch.zeros(16, 3), torch.zeros(16), False
        )
