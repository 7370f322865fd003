"""Muon for matrices beside AdamW: its steps are PyTorch's, its updates orthogonal."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dimr_fast import DiMR
from dimr_fast.diffusion import multi_scale_loss
from dimr_fast.optim import muon, orthogonalize

SHAPES = [(24, 24), (24, 24), (24, 64), (64, 24), (64, 24), (8, 120), (130, 8), (1, 5)]
DECAY = 0.1


def network() -> nn.Module:
    """Return layers with matrices of all `SHAPES`, and parameters of other kinds."""
    torch.manual_seed(0)
    layers = [nn.Linear(columns, rows) for rows, columns in SHAPES]
    others = [nn.Embedding(7, 24), nn.LayerNorm(24), nn.Conv2d(24, 24, 3, groups=24)]
    return nn.ModuleList([*layers, *others])


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear)]


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        # Of low rank too, as the gradients of a network are.
        scale = torch.logspace(0, -3, gradient.shape[-1])
        parameter.grad = (gradient * scale).to(parameter.dtype)


def tiny() -> DiMR:
    torch.manual_seed(0)
    return DiMR.from_preset("tiny")


def loss_of(model: DiMR) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(4, 3, 16, 16, generator=generator) for _ in range(2))
    predictions = model(x, log_snr=torch.linspace(-4, 4, 4), y=torch.arange(4))
    return multi_scale_loss(predictions, noise).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_torch_muon_and_adamw(dtype: torch.dtype) -> None:
    """torch's Muon multiplies in bf16: after five steps its rounding is up to two per cent."""
    ours, theirs = network(), network()
    start = [p.detach().clone() for p in ours.parameters()]
    optimizer = muon(ours, 0.02, betas=(0.9, 0.99), weight_decay=DECAY, dtype=dtype)
    expected = torch.optim.Muon(
        matrices(theirs), lr=0.02, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
    )
    chosen = set(matrices(theirs))
    rest = [p for p in theirs.parameters() if p not in chosen]
    others = torch.optim.AdamW(rest, lr=0.02, betas=(0.9, 0.99), weight_decay=DECAY, fused=True)
    for step in range(4):
        for model in (ours, theirs):
            set_gradients(model, step)
        for one in (optimizer, expected, others):
            one.step()
        for a, b, before in zip(ours.parameters(), theirs.parameters(), start, strict=True):
            if b in chosen:
                distance = (a - b).norm() / (b - before).norm()
                assert distance < 0.03, (step, a.shape)
            else:
                assert torch.equal(a, b)


def test_only_weights_of_linear_layers_are_orthogonalised() -> None:
    model = tiny()
    optimizer = muon(model, 1e-3)
    names = {parameter: name for name, parameter in model.named_parameters()}
    first, decayed, exempt = optimizer.param_groups
    found = {names.pop(p) for p in first["params"]}
    parts = ("query_key_value", "dense", "w0", "w1", "w2", "skip_denses", "kernel")
    assert all(name.endswith("weight") and any(p in name for p in parts) for name in found)
    assert {p for p in parts if any(p in name for name in found)} == set(parts)
    assert all("nodecay_" in names.pop(p) for p in exempt["params"])
    assert not any("nodecay_" in names.pop(p) for p in decayed["params"])
    assert not names
    assert (first["weight_decay"], decayed["weight_decay"], exempt["weight_decay"]) == (
        0.03,
    ) * 2 + (0,)


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("shape", [(3, 64, 64), (5, 40, 100), (2, 300, 60), (4, 1, 6)])
def test_singular_values_are_near_one(
    shape: tuple[int, int, int], dtype: torch.dtype, slack: float
) -> None:
    """For singular values of 0.01 to 1 times the largest; they were those of a random rotation."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    spread = torch.logspace(0, -2, s.shape[-1], dtype=torch.float64)
    x = 1e-4 * (u * spread) @ vh
    found = orthogonalize(x.float(), dtype)
    assert found.dtype == dtype
    values = torch.linalg.svdvals(found.double())
    assert values.min() > 0.68 - slack
    assert values.max() < 1.21 + slack
    # The singular vectors stay: U V' differs by the singular values only.
    assert torch.linalg.matrix_norm(found.double() - u @ vh, ord=2).max() < 0.33 + slack


def test_products_follow_the_polynomial_on_singular_values() -> None:
    x = torch.randn(3, 20, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / torch.linalg.matrix_norm(x)[:, None]
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = (u * s[:, None]) @ vh
    torch.testing.assert_close(orthogonalize(x, torch.float64), expected, rtol=0, atol=1e-12)
    rounded = orthogonalize(x.float()).double()
    torch.testing.assert_close(rounded, expected, rtol=0, atol=1e-4)


def test_an_update_is_about_as_large_as_that_of_adamw() -> None:
    """A fifth of the learning rate, as root mean square: singular values are 0.68 to 1.21."""
    model = network()
    before = [p.detach().clone() for p in matrices(model)]
    optimizer = muon(model, 0.01, weight_decay=0)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    for p, old in zip(matrices(model), before, strict=True):
        assert 0.68 < (p - old).square().mean().sqrt() / 0.002 < 1.21, p.shape


def test_a_gradient_of_zeros_only_decays_and_none_does_nothing() -> None:
    model = network()
    before = [p.detach().clone() for p in matrices(model)]
    optimizer = muon(model, 0.01, weight_decay=DECAY)
    zeros, nones = matrices(model)[:4], matrices(model)[4:]
    for p in zeros:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(zeros, before[:4], strict=True):
        torch.testing.assert_close(p.detach(), old * (1 - 0.01 * DECAY))
    assert all(torch.equal(p, old) for p, old in zip(nones, before[4:], strict=True))


def test_a_copied_and_a_restored_optimizer_continue_with_the_same_bits() -> None:
    def steps(model: DiMR, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

    model = tiny()
    optimizer = muon(model, 1e-2)
    steps(model, optimizer)
    copied, copied_optimizer = copy.deepcopy((model, optimizer))
    restored = copy.deepcopy(model)
    restored_optimizer = muon(restored, 1e-2)
    restored_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in ((model, optimizer), (copied, copied_optimizer), (restored, restored_optimizer)):
        steps(*one)
    for p, q, r in zip(*(m.parameters() for m in (model, copied, restored)), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def test_it_learns() -> None:
    model = tiny()
    optimizer = muon(model, 4e-3, betas=(0.9, 0.99))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", ["w0.weight", "position_embeddings.weight"])
def test_an_overflow_of_scaled_gradients_skips_both_methods(name: str) -> None:
    """Whether a matrix overflows or a parameter of AdamW."""
    model = tiny()
    optimizer = muon(model, 1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaler.scale(loss_of(model)).backward()
    scaler.step(optimizer)
    scaler.update()
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    scaler.scale(loss_of(model)).backward()
    spoiled = next(p for n, p in model.named_parameters() if n.endswith(name))
    assert spoiled.grad is not None
    spoiled.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**8
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_a_step_may_evaluate_the_loss_itself() -> None:
    model = tiny()
    optimizer = muon(model, 1e-2)

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss.item()

    first = optimizer.step(closure)
    assert first is not None
    assert loss_of(model).item() < first


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("learning_rate", -1.0),
        ("betas", (0.9, 1.0)),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("dtype", torch.float16),
    ],
)
def test_an_argument_out_of_range_is_named(argument: str, value: object) -> None:
    arguments = {"learning_rate": 1e-3, argument: value}
    with pytest.raises(ValueError, match=f"{argument}: got "):
        muon(tiny(), **arguments)
