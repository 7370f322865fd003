"""The wrappers of torch.distributed around the model: results and memory on two processes."""

from typing import Any

import pytest
import torch

from tests.support import parallel
from tests.support.memory import memory_from_here
from tests.support.models import inputs_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]

CASES: list[tuple[str, dict[str, Any]]] = [
    *((wrapper, {}) for wrapper in parallel.WRAPPERS),
    ("FSDP2, blocks", {"checkpointing": True}),
    ("FSDP2, blocks", {"checkpointing": "selective"}),
    ("FSDP2, branches", {"norm_type": "LN"}),
]


@pytest.fixture(scope="module")
def trained() -> list[dict[str, torch.Tensor]]:
    """Return the weights after training of each case, all by the same two processes."""
    return parallel.run(parallel.weights_after_training, CASES)


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i])))
def test_two_processes_train_what_one_does(
    case: int, trained: list[dict[str, torch.Tensor]]
) -> None:
    found, (_, settings) = trained[case], CASES[case]
    model = parallel.small(**settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parallel.train(model, inputs_of(model, 4))
    assert found.keys() == before.keys()
    for name, expected in model.named_parameters():
        assert not torch.equal(expected, before[name]), name
        torch.testing.assert_close(found[name], expected.detach(), rtol=1e-4, atol=1e-6)


def test_sharded_blocks_need_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights and gradients of one process are half of all and those of a few blocks."""
    memory_from_here()  # skips the test here, since the processes below cannot
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # freed tensors leave the process
    whole = parallel.run(parallel.peak_memory, "", processes=1)
    half = parallel.run(parallel.peak_memory, "FSDP2, blocks")
    print(f"{whole / 1e6:.0f} MB, sharded {half / 1e6:.0f} MB")
    assert 0 < half < 0.75 * whole
