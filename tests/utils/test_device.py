"""The choice of device and precision."""

import platform
import subprocess
import sys

import pytest
import torch

from dimr_fast.utils import device
from dimr_fast.utils.distributed import init_communicator


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.resolve_device("auto") == torch.device("cuda")


def test_an_unusable_device_is_named() -> None:
    for name in ("abacus", "cuda:99"):
        with pytest.raises(ValueError, match=f"device: got '{name}'"):
            device.resolve_device(name)


def test_auto_precision_is_bf16_where_it_is_faster() -> None:
    cpu = torch.device("cpu")
    assert device.resolve_precision("fp32", cpu) == torch.float32
    assert device.resolve_precision("bf16", cpu) == torch.bfloat16
    for faster, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        measured = device.resolve_precision("auto", cpu, measure_cpu=lambda faster=faster: faster)
        assert measured == dtype


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_that_emulates_bf16_computes_in_fp32(
    monkeypatch: pytest.MonkeyPatch, native: bool, dtype: torch.dtype
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert device.resolve_precision("auto", torch.device("cuda")) == dtype


def test_processes_that_would_share_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would only say that a GPU is a duplicate."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="device: got 'auto' with 1 GPUs for 2 processes"):
        init_communicator("auto")


def test_the_device_has_a_name() -> None:
    assert device.device_name(torch.device("cpu")).startswith("CPU, ")


FAULTS = """
import resource
import torch
from dimr_fast.utils.device import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
keep_freed_memory()
# The heap grows for a few rounds before every block is reused.
print(given_back, [faults() for _ in range(8)][-1])
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc"
    or tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 35),
    reason="only glibc 2.35 or later keeps blocks of any size",
)
def test_freed_memory_is_reused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    )
    given_back, kept = map(int, done.stdout.split())
    assert kept < given_back / 10
