"""What training sends is counted right, and the costs on paper follow from it."""

import pytest
import torch

from benchmarks.report.processes import Cluster, communication_text, processes_text, sent
from benchmarks.training.communication import Collectives, count, fake_processes, gradient_step
from benchmarks.training.processes import measure
from dimr_fast import PRESETS, DiMR
from dimr_fast.utils.distributed import Communicator
from tests.support.parallel import run

TINY = PRESETS["tiny"]
PARAMETERS = sum(p.numel() for p in DiMR(TINY).parameters())
SYNCHRONISATION = 32
"""Bytes of the last collective of a step: whether to stop, loss, norm and clock."""


def counted_over_gloo(rank: int, sharding: str, path: object) -> None:
    """Take a step of this process; rank 0 saves what it counted and what the profiler saw."""
    communicator = Communicator(rank, 2, torch.device("cpu"))
    _, step = gradient_step(TINY, sharding, communicator, 1)
    step()
    with Collectives() as collectives:
        step()
    with torch.profiler.profile(record_shapes=True) as profile:
        step()
    seen = [event.name for event in profile.events() if event.name.startswith("gloo:")]
    if rank == 0:
        torch.save((collectives.totals(), seen), str(path))


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_real_processes_send_what_was_counted(sharding: str) -> None:
    with fake_processes(2) as communicator:
        expected = count(TINY, sharding, communicator)
    found, seen = run(counted_over_gloo, sharding)
    assert found == expected
    assert len(seen) == sum(row["messages"] for row in expected.values())


def test_a_step_sends_each_gradient_once() -> None:
    with fake_processes(8) as communicator:
        ddp = count(TINY, "none", communicator)
        fsdp2 = count(TINY, "fsdp2", communicator)
    assert ddp["all-reduce"]["bytes"] == 4 * PARAMETERS + SYNCHRONISATION
    for kind in ("all-gather", "reduce-scatter"):
        assert fsdp2[kind]["messages"] == 1
        # Each parameter is padded to a multiple of the processes.
        assert 4 * PARAMETERS <= fsdp2[kind]["bytes"] <= 1.1 * 4 * PARAMETERS + 4096


def test_a_ring_sends_every_byte_but_its_own() -> None:
    assert sent("all-gather", 800, 8) == 700
    assert sent("reduce-scatter", 800, 8) == 700
    assert sent("all-reduce", 800, 8) == 1400
    cluster = Cluster(fast=100.0, slow=10.0, latency=0.5)
    assert cluster.seconds("all-gather", 2, 800, 8) == pytest.approx(7 + 2 * 0.5 * 3)
    assert cluster.seconds("all-gather", 2, 1600, 16) == pytest.approx(150 + 2 * 0.5 * 4)


def test_the_costs_are_those_of_a_hand_calculation() -> None:
    part = {"all-reduce": {"messages": 1, "bytes": 8_000_000_000}}
    facts = {"forward_flops": 1e11, "training_flops": 4e11, "none": part, "fsdp2": part}
    text = communication_text({"presets": {"model": facts}})
    assert "Assumed, not measured: a GPU computes 400 TFLOP/s" in text
    # 128 images of 1 ms; 14 GB at 300 GB/s and 30 µs; a million steps in days.
    assert "| model | 8 | 128 | 128.0 | 46.7 | 1.48–2.02 | 46.7 | 1.48–2.02 |" in text
    # 125 batches of 50 images, of 50 forward passes of 0.25 ms.
    assert "| model | 8 | 125 | 78 | 0.17 |" in text


@pytest.mark.slow
def test_processes_share_a_batch() -> None:
    rows = [measure("tiny", 4, 2, sharding, n) for n, sharding in ((1, "none"), (2, "fsdp2"))]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert all(row["resident_bytes_of_a_process"] > 4 * PARAMETERS for row in rows)
    text = processes_text({"cores": 1, "backend": "gloo", "rows": rows})
    assert "share one core" in text
    assert "| 2 | FSDP2 |" in text
