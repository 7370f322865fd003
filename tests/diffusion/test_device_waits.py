"""Training and sampling never wait for the device, and take empty batches.

Code that waits needs values, so tensors without values show it on any machine.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dimr_fast.diffusion import (
    ConstantGuidance,
    DiscreteSchedule,
    PowerCosineGuidance,
    dpm_solver_singlestep,
    guided,
    multi_scale_loss,
)
from tests.support.diffusion import (
    SCHEDULE,
    ClassModel,
)


def training_step(device: str) -> torch.Tensor:
    schedule = DiscreteSchedule(device)
    x0, noise = torch.randn(2, 2, 4, 8, 8, device=device)
    step = torch.randint(1, 1001, (2,), device=device)
    noisy = schedule.add_noise(x0, noise, step)
    predictions = [noisy[..., ::2, ::2], noisy * schedule.condition(step).view(-1, 1, 1, 1)]
    return multi_scale_loss(predictions, noise)


def sampling(device: str, guidance: ConstantGuidance | PowerCosineGuidance) -> torch.Tensor:
    y = torch.ones(2, dtype=torch.long, device=device)
    x = torch.randn(2, 4, 8, 8, device=device)
    noise_fn = guided(ClassModel(), y, 0, guidance)
    return dpm_solver_singlestep(noise_fn, x, DiscreteSchedule(device), 7)


def test_nothing_waits_for_the_device() -> None:
    assert training_step("meta").device.type == "meta"
    with FakeTensorMode():
        assert training_step("cpu").shape == (2,)
    for guidance in (ConstantGuidance(0.4), PowerCosineGuidance(4.0, 2.0)):
        assert sampling("meta", guidance).device.type == "meta"
        with FakeTensorMode():
            assert sampling("cpu", guidance).shape == (2, 4, 8, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_gpu() -> None:
    schedule = DiscreteSchedule("cuda")
    x = torch.randn(2, 4, 8, 8, device="cuda")
    step = torch.randint(1, 1001, (2,), device="cuda")
    noise_fn = guided(
        ClassModel(), torch.ones(2, dtype=torch.long, device="cuda"), 0, ConstantGuidance(0.4)
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = multi_scale_loss([x[..., ::2, ::2], schedule.add_noise(x, x, step)], x)
        condition = schedule.condition(step)
        sample = dpm_solver_singlestep(noise_fn, x, schedule, 7)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite().all()
    assert condition.isfinite().all()
    assert sample.isfinite().all()


@pytest.mark.versions
def test_a_training_step_compiles_without_a_graph_break() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def step_loss(x0: torch.Tensor, noise: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        noisy = SCHEDULE.add_noise(x0, noise, step)
        return multi_scale_loss([noisy[..., ::2, ::2], noisy], noise)

    x0, noise = torch.randn(2, 2, 4, 8, 8)
    step = torch.tensor([3, 700])
    noisy = SCHEDULE.add_noise(x0, noise, step)
    torch.testing.assert_close(
        step_loss(x0, noise, step), multi_scale_loss([noisy[..., ::2, ::2], noisy], noise)
    )


def test_an_empty_batch_passes_through() -> None:
    x = torch.randn(0, 4, 8, 8)
    assert SCHEDULE.add_noise(x, x, torch.zeros(0, dtype=torch.long)).shape == x.shape
    assert multi_scale_loss([x[..., ::2, ::2], x], x).shape == (0,)
    y = torch.zeros(0, dtype=torch.long)
    noise_fn = guided(ClassModel(), y, 0, ConstantGuidance(1.0))
    assert dpm_solver_singlestep(noise_fn, x, SCHEDULE, 4).shape == x.shape
