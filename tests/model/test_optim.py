"""The published optimizer and EMA, and training scripts that people already have."""

import copy
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from dimr_fast import DiMR
from dimr_fast.diffusion import multi_scale_loss
from dimr_fast.optim import EMA, adamw

IMAGES = 4


def model() -> DiMR:
    torch.manual_seed(0)
    return DiMR.from_preset("tiny")


def batch(images: int = IMAGES) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images, 3, 16, 16, generator=generator)
    noise = torch.randn(images, 3, 16, 16, generator=generator)
    return x, torch.linspace(-4, 4, images), torch.arange(images) % 6, noise


def mean_loss(run: torch.nn.Module, start: int = 0, end: int = IMAGES) -> torch.Tensor:
    dtype = next(run.parameters()).dtype
    x, log_snr, y, noise = (
        t[start:end].to(dtype if t.is_floating_point() else t.dtype) for t in batch()
    )
    return multi_scale_loss(run(x, log_snr=log_snr, y=y), noise).mean()


def test_groups_are_the_published_ones() -> None:
    dimr = model()
    optimizer = adamw(dimr, 2e-4)
    decayed, exempt = optimizer.param_groups
    assert (decayed["lr"], decayed["betas"], decayed["weight_decay"]) == (2e-4, (0.99, 0.99), 0.03)
    assert exempt["weight_decay"] == 0
    names = {id(p): name for name, p in dimr.named_parameters()}
    assert all("nodecay_" in names.pop(id(p)) for p in exempt["params"])
    assert not any("nodecay_" in names.pop(id(p)) for p in decayed["params"])
    assert not names


def test_a_step_is_that_of_plain_adamw() -> None:
    # In float64: where a gradient is nearly zero AdamW divides one rounding error by another.
    ours, theirs = model().double(), model().double()
    optimizer = adamw(ours, 1e-3)
    plain = torch.optim.AdamW(
        [
            {"params": [p], "weight_decay": 0.0 if "nodecay_" in name else 0.03}
            for name, p in theirs.named_parameters()
        ],
        lr=1e-3,
        betas=(0.99, 0.99),
        foreach=False,
    )
    for run, o in ((ours, optimizer), (theirs, plain)):
        for _ in range(3):
            o.zero_grad()
            mean_loss(run).backward()
            o.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_ema_follows_its_formula_keeps_no_graph_and_loads() -> None:
    dimr = model()
    ema = EMA(dimr)
    before = {name: p.detach().clone() for name, p in dimr.named_parameters()}
    with torch.no_grad():
        for p in dimr.parameters():
            p.add_(1)
    assert torch.is_grad_enabled()
    ema.update(0.75)
    for name, value in ema.tensors.items():
        torch.testing.assert_close(value, before[name] + 0.25)
        # With a graph every step of a run would stay in memory.
        assert not value.requires_grad
        assert value.grad_fn is None
    other = model()
    other.load_state_dict(ema.tensors, strict=True)
    with pytest.raises(ValueError, match=r"decay: got 1"):
        ema.update(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_ema_of_any_dtype_moves(dtype: torch.dtype) -> None:
    """In half precision a change of a ten-thousandth would be rounded away at every step."""
    linear = torch.nn.Linear(4, 4).to(dtype)
    torch.nn.init.ones_(linear.weight)
    ema = EMA(linear)
    torch.nn.init.constant_(linear.weight, 2.0)
    for _ in range(5000):
        ema.update(0.9999)
    expected = torch.full((4, 4), 2 - 0.9999**5000, dtype=ema.tensors["weight"].dtype)
    torch.testing.assert_close(ema.tensors["weight"], expected, rtol=1e-4, atol=0)
    assert ema.tensors["weight"].dtype == torch.promote_types(dtype, torch.float32)
    linear.load_state_dict(ema.tensors)
    assert linear.weight.dtype == dtype


def test_fp16_with_a_grad_scaler_trains_and_skips_what_overflows() -> None:
    dimr = model()
    optimizer = adamw(dimr, 2e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = mean_loss(dimr)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]

    before = copy.deepcopy(dimr.state_dict())
    optimizer.zero_grad()
    scaler.scale(mean_loss(dimr)).backward()
    dimr.stages[0].blocks[0].block2.w0.weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**8
    assert all(torch.equal(before[name], p) for name, p in dimr.state_dict().items())


def _ddp_worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    # Neither find_unused_parameters nor a static graph: it raises where a gradient is missing.
    run = DistributedDataParallel(model())
    for _ in range(2):
        run.zero_grad()
        half = IMAGES // 2
        mean_loss(run, rank * half, (rank + 1) * half).backward()
    if rank == 0:
        torch.save([p.grad for p in run.parameters()], folder / "grads.pt")
    torch.distributed.destroy_process_group()


def test_ddp_of_two_processes_has_the_gradients_of_one(tmp_path: Path) -> None:
    mp.spawn(_ddp_worker, (tmp_path,), nprocs=2)
    alone = model()
    mean_loss(alone).backward()
    grads = torch.load(tmp_path / "grads.pt", weights_only=True)
    for grad, parameter in zip(grads, alone.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-6)
