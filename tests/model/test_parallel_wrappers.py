"""The wrappers of torch.distributed around the model: results and memory on two processes."""

import pytest
import torch

from tests.support import parallel
from tests.support.models import inputs_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]

CASES = [
    *((wrapper, {}) for wrapper in parallel.WRAPPERS),
    ("FSDP2, blocks", {"checkpointing": True}),
    ("FSDP2, blocks", {"checkpointing": "selective"}),
    ("FSDP2, branches", {"norm_type": "LN"}),
]


@pytest.mark.parametrize(("wrapper", "settings"), CASES, ids=str)
def test_two_processes_train_what_one_does(wrapper: str, settings: dict[str, object]) -> None:
    found = parallel.run(parallel.weights_after_training, wrapper, settings)
    model = parallel.small(**settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parallel.train(model, inputs_of(model, 4))
    assert found.keys() == before.keys()
    for name, expected in model.named_parameters():
        assert not torch.equal(expected, before[name]), name
        torch.testing.assert_close(found[name], expected.detach(), rtol=1e-4, atol=1e-6)


def test_sharded_blocks_need_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights and gradients of one process are half of all and those of a few blocks."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # freed tensors leave the process
    whole = parallel.run(parallel.peak_memory, "", {}, processes=1)
    half = parallel.run(parallel.peak_memory, "FSDP2, blocks", {})
    print(f"{whole / 1e6:.0f} MB, sharded {half / 1e6:.0f} MB")
    assert 0 < half < 0.75 * whole
