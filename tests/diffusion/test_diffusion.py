"""The diffusion process against the published model's numbers and against its own mathematics."""

import json
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from dimr_fast.diffusion import (
    ConstantGuidance,
    DiscreteSchedule,
    PowerCosineGuidance,
    dpm_solver_singlestep,
    guided,
    multi_scale_loss,
    pool_noise,
    time_condition,
)
from dimr_fast.diffusion.solvers import _group, _plan
from tests.support.paths import FILES

GOLDEN = load_file(FILES / "diffusion.safetensors")
MODEL_CASES = ["two_branch_tdrms", "two_branch_tdln", "two_branch_rms", "three_branch_tdrms"]
SCHEDULE = DiscreteSchedule()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def with_class(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x * (0.5 + t))


def without_class(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x * (0.3 + 0.5 * t))


class ClassModel:
    """The golden files' pair of noise models as one class-conditional model; label 0 is null."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __call__(self, x: torch.Tensor, condition: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls.append((x, condition, y))
        t = ((condition + 4) / 8).view(-1, 1, 1, 1)
        return torch.where((y == 0).view(-1, 1, 1, 1), without_class(x, t), with_class(x, t))


# Schedule


def test_schedule_has_the_published_values() -> None:
    for name in ("betas", "alphas_cumprod"):
        values = getattr(SCHEDULE, name)
        assert values.dtype == torch.float64
        torch.testing.assert_close(values, GOLDEN[f"schedule/{name}"], rtol=1e-14, atol=0)


def test_continuous_time_has_the_published_values() -> None:
    """The published schedule works in float32, which alone limits the agreement at small t."""
    for i, t in enumerate(GOLDEN["schedule/t"].tolist()):
        lam = GOLDEN["schedule/lambda_at_t"][i].item()
        assert SCHEDULE.half_log_snr(t) == pytest.approx(lam, rel=4e-6, abs=4e-6)
        log_alpha = GOLDEN["schedule/log_alpha_at_t"][i].item()
        assert SCHEDULE.log_alpha(t) == pytest.approx(log_alpha, rel=4e-6, abs=2e-8)
        expected = GOLDEN["schedule/t_of_lambda"][i].item()
        assert SCHEDULE.time_at(lam) == pytest.approx(expected, rel=4e-6, abs=5e-8)


@given(st.floats(1e-3, 1.0))
def test_time_is_the_inverse_of_half_log_snr(t: float) -> None:
    assert SCHEDULE.time_at(SCHEDULE.half_log_snr(t)) == pytest.approx(t, rel=1e-10)


@given(st.floats(1e-3, 1.0))
def test_alpha_and_sigma_keep_unit_variance(t: float) -> None:
    alpha, sigma = SCHEDULE.alpha_sigma(t)
    assert alpha**2 + sigma**2 == pytest.approx(1, rel=1e-14)
    assert math.log(alpha / sigma) == pytest.approx(SCHEDULE.half_log_snr(t), abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 500, 999, 1000])
def test_continuous_time_passes_through_the_steps(n: int) -> None:
    expected = 0.5 * math.log(SCHEDULE.alphas_cumprod[n - 1].item())
    assert SCHEDULE.log_alpha(n / 1000) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (3,), (3, 5)])
def test_add_noise(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x0, noise = torch.randn(2, *shape, dtype=dtype)
    step = torch.tensor([1, 400, 1000])
    noisy = SCHEDULE.add_noise(x0, noise, step)
    assert noisy.dtype == dtype
    for image, n in enumerate(step.tolist()):
        kept = GOLDEN["schedule/alphas_cumprod"][n - 1]
        expected = kept.sqrt() * x0[image].double() + (1 - kept).sqrt() * noise[image].double()
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            noisy[image].double(), expected, rtol=tolerance, atol=tolerance * 4
        )


def test_condition_is_linear_in_the_step() -> None:
    condition = SCHEDULE.condition(torch.tensor([[1, 250], [500, 1000]]))
    assert condition.dtype == torch.float32
    torch.testing.assert_close(condition, torch.tensor([[-3.992, -2.0], [0.0, 4.0]]))
    torch.testing.assert_close(time_condition(torch.tensor(0.25)), torch.tensor(-2.0))


def test_an_empty_batch_passes_through() -> None:
    x = torch.randn(0, 4, 8, 8)
    assert SCHEDULE.add_noise(x, x, torch.zeros(0, dtype=torch.long)).shape == x.shape
    assert multi_scale_loss([x[..., ::2, ::2], x], x).shape == (0,)
    y = torch.zeros(0, dtype=torch.long)
    noise_fn = guided(ClassModel(), y, 0, ConstantGuidance(1.0))
    assert dpm_solver_singlestep(noise_fn, x, SCHEDULE, 4).shape == x.shape


# Loss


@pytest.mark.parametrize("case", MODEL_CASES)
def test_loss_has_the_published_values(case: str) -> None:
    with safe_open(FILES / f"{case}.safetensors", "pt") as file:
        coefficients = json.loads(file.metadata()["config"])["loss_coeffs"]
        predictions = [file.get_tensor(f"mixed_time/out/{i}") for i in range(len(coefficients))]
        noise, expected = file.get_tensor("in/noise"), file.get_tensor("loss/per_image")
    torch.testing.assert_close(
        multi_scale_loss(predictions, noise, coefficients), expected, rtol=2e-6, atol=0
    )
    assert torch.equal(
        multi_scale_loss(predictions, noise), multi_scale_loss(predictions, noise, coefficients)
    )


@settings(max_examples=25, deadline=None)
@given(
    factors=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    aspect=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_loss_against_the_formula(
    factors: list[int], batch: int, channels: int, aspect: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    height, width = 12, 12 * aspect
    noise = torch.randn(batch, channels, height, width, dtype=dtype, generator=generator)
    coefficients = [0.5 + 0.25 * i for i in range(len(factors))]
    predictions = [
        torch.randn(batch, channels, height // q, width // q, dtype=dtype, generator=generator)
        for q in factors
    ]
    expected = torch.zeros(batch, dtype=torch.float64)
    for q, c, prediction in zip(factors, coefficients, predictions, strict=True):
        boxes = noise.double().reshape(batch, channels, height // q, q, width // q, q)
        target = boxes.sum(dim=(3, 5)) / q
        expected += c * ((prediction.double() - target) ** 2).flatten(1).mean(1)
    actual = multi_scale_loss(predictions, noise, coefficients)
    assert actual.dtype == dtype
    torch.testing.assert_close(
        actual.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0
    )


@settings(max_examples=10, deadline=None)
@given(factor=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_pooled_noise_has_unit_variance(factor: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = 64
    noise = torch.randn(1, 4, values * factor, values * factor, generator=generator)
    pooled = pool_noise(noise, factor)
    assert pooled.shape == (1, 4, values, values)
    # Six standard deviations of the variance of 4·64² normal values.
    assert pooled.var().item() == pytest.approx(1, abs=6 * math.sqrt(2 / pooled.numel()))


def test_loss_of_low_precision_predictions_is_computed_in_float32() -> None:
    noise = torch.randn(2, 4, 8, 8)
    predictions = [torch.randn(2, 4, n, n, dtype=torch.bfloat16) for n in (4, 8)]
    loss = multi_scale_loss(predictions, noise)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, multi_scale_loss([p.float() for p in predictions], noise))


def test_loss_gradient_is_that_of_the_mean_squared_error() -> None:
    noise = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    predictions = [
        torch.randn(2, 3, n, n, dtype=torch.float64, requires_grad=True) for n in (2, 4, 8)
    ]
    multi_scale_loss(predictions, noise).sum().backward()
    for prediction, coefficient in zip(predictions, (0.25, 0.5, 1.0), strict=True):
        target = pool_noise(noise, 8 // prediction.shape[-1])
        count = prediction[0].numel()
        expected = 2 * coefficient * (prediction.detach() - target) / count
        torch.testing.assert_close(prediction.grad, expected)


# Guidance


def test_guidance_is_one_batch_of_twice_the_size() -> None:
    model = ClassModel()
    x, y = torch.randn(3, 4, 8, 8), torch.tensor([5, 6, 7])
    t = torch.tensor(0.3)
    noise = guided(model, y, 0, ConstantGuidance(0.4))(x, t)
    [(both, condition, labels)] = model.calls
    assert torch.equal(both, torch.cat([x, x]))
    assert torch.equal(labels, torch.tensor([5, 6, 7, 0, 0, 0]))
    torch.testing.assert_close(condition, torch.tensor([8 * 0.3 - 4]))
    conditional, null = with_class(x, t), without_class(x, t)
    torch.testing.assert_close(noise, conditional + 0.4 * (conditional - null))


@pytest.mark.parametrize("guidance", [ConstantGuidance(1.5), PowerCosineGuidance(4.0, 2.0)])
def test_guidance_with_a_time_for_each_image(
    guidance: ConstantGuidance | PowerCosineGuidance,
) -> None:
    x, y = torch.randn(3, 4, 8, 8), torch.tensor([5, 6, 7])
    t = torch.tensor([0.1, 0.6, 1.0])
    model = ClassModel()
    noise = guided(model, y, 0, guidance)(x, t)
    assert model.calls[0][1].shape == (6,)
    for i in range(3):
        alone = guided(ClassModel(), y[i : i + 1], 0, guidance)(x[i : i + 1], t[i])
        torch.testing.assert_close(noise[i : i + 1], alone)


@pytest.mark.parametrize("guidance", [ConstantGuidance(0.0), PowerCosineGuidance(1.0, 2.0)])
def test_no_guidance_skips_the_null_half(
    guidance: ConstantGuidance | PowerCosineGuidance,
) -> None:
    model = ClassModel()
    x, y, t = torch.randn(3, 4, 8, 8), torch.tensor([5, 6, 7]), torch.tensor(0.3)
    noise = guided(model, y, 0, guidance)(x, t)
    [(alone, _, labels)] = model.calls
    assert alone is x
    assert labels is y
    torch.testing.assert_close(noise, with_class(x, t))


@given(st.floats(0, 1), st.floats(1, 20), st.floats(0.1, 8))
def test_power_cosine_weight(t: float, peak: float, power: float) -> None:
    extra = PowerCosineGuidance(peak, power).extra(torch.tensor(t, dtype=torch.float64)).item()
    weight = (peak - 1) * 0.5 * (1 - math.cos(math.pi * (1 - t) ** power)) + 1
    assert 1 + extra == pytest.approx(weight)
    assert 0 <= extra <= peak - 1 + 1e-12


def test_guidance_is_computed_in_the_dtype_of_the_state() -> None:
    x, y, t = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor(0.5)

    def half(x: torch.Tensor, condition: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ClassModel()(x, condition, y).bfloat16()

    noise = guided(half, y, 0, ConstantGuidance(2.0))(x, t)
    conditional, null = (f(x, t).bfloat16().float() for f in (with_class, without_class))
    assert noise.dtype == torch.float32
    torch.testing.assert_close(noise, conditional + 2 * (conditional - null))


# Solver


@pytest.mark.parametrize("steps", [5, 6, 10, 25, 50, 250])
def test_sampler_draws_the_published_samples(steps: int) -> None:
    sample = dpm_solver_singlestep(with_class, GOLDEN["sampler/z_init"], SCHEDULE, steps)
    assert sample.dtype == torch.float32
    assert relative_error(sample, GOLDEN[f"sampler/plain/{steps}"]) < 2e-6


@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        ("cfg_const_0.4", ConstantGuidance(0.4)),
        ("cfg_power_cosine_4.0_2.0", PowerCosineGuidance(4.0, 2.0)),
    ],
)
def test_guided_sampler_draws_the_published_samples(
    name: str, guidance: ConstantGuidance | PowerCosineGuidance
) -> None:
    model = ClassModel()
    z = GOLDEN["sampler/z_init"]
    noise_fn = guided(model, torch.ones(len(z), dtype=torch.long), 0, guidance)
    sample = dpm_solver_singlestep(noise_fn, z, SCHEDULE, 25)
    assert relative_error(sample, GOLDEN[f"sampler/{name}/25"]) < 2e-6
    assert len(model.calls) == 25
    assert all(len(x) == 2 * len(z) for x, _, _ in model.calls)


@given(st.integers(1, 300))
def test_steps_counts_network_evaluations(steps: int) -> None:
    plan = _plan(SCHEDULE, steps)
    assert sum(map(len, plan)) == steps
    last = {0: [2, 1], 1: [1], 2: [2]}[steps % 3]
    assert [len(group) for group in plan] == [3] * ((steps - sum(last)) // 3) + last
    times = [stage.time for group in plan for stage in group]
    expected = [1 + (0.001 - 1) * i / steps for i in range(steps)]
    assert times == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_evaluations_and_progress(steps: int) -> None:
    times, progress = [], []

    def noise_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert t.shape == ()
        times.append(t.item())
        return with_class(x, t)

    x = torch.randn(2, 4, 8, 8)
    sample = dpm_solver_singlestep(
        noise_fn, x, SCHEDULE, steps, progress=lambda: progress.append(len(times))
    )
    assert times[0] == 1
    assert times == sorted(times, reverse=True)
    assert len(times) == steps
    assert progress == list(range(1, steps + 1))
    assert sample.shape == x.shape


class GaussianProblem:
    """Data from N(mean, std²), where the noise prediction and the solution are known exactly."""

    mean, std = 0.7, 0.4

    def marginal_std(self, t: float) -> float:
        alpha, sigma = SCHEDULE.alpha_sigma(t)
        return math.hypot(alpha * self.std, sigma)

    def noise_fn(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = SCHEDULE.alpha_sigma(t.item())
        return sigma * (x - alpha * self.mean) / self.marginal_std(t.item()) ** 2

    def solution(self, x: torch.Tensor, start: float, end: float) -> torch.Tensor:
        standard = (x - SCHEDULE.alpha_sigma(start)[0] * self.mean) / self.marginal_std(start)
        return SCHEDULE.alpha_sigma(end)[0] * self.mean + self.marginal_std(end) * standard


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_convergence(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Doubling the groups of one order divides the error by 2^order.

    The interval stays away from t = 0, where λ is too steep in t for a time grid to be in the
    asymptotic range.
    """
    problem, start, end = GaussianProblem(), 1.0, 0.2
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = []
    for groups in (8, 16, 32, 64):
        size = (end - start) / (groups * order)
        times = [start + i * size for i in range(groups * order + 1)]
        plan = [_group(SCHEDULE, times[i * order : (i + 1) * order + 1]) for i in range(groups)]
        monkeypatch.setattr("dimr_fast.diffusion.solvers._plan", lambda *_, plan=plan: plan)
        sample = dpm_solver_singlestep(problem.noise_fn, x, SCHEDULE, groups * order)
        errors.append((sample - problem.solution(x, start, end)).abs().max().item())
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders[-1] == pytest.approx(order, abs=0.25), (errors, orders)


def test_samples_approach_the_exact_solution() -> None:
    problem = GaussianProblem()
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = problem.solution(x, 1.0, 0.001)
    errors = [
        (dpm_solver_singlestep(problem.noise_fn, x, SCHEDULE, steps) - exact).abs().max().item()
        for steps in (20, 80, 320, 1280)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2e-5


def test_clipping_bounds_the_sample_and_a_wide_range_changes_nothing() -> None:
    z = GOLDEN["sampler/z_init"]
    plain = dpm_solver_singlestep(with_class, z, SCHEDULE, 10)
    bound = plain.abs().max().item() / 2
    assert (plain.abs() > bound).any()
    clipped = dpm_solver_singlestep(with_class, z, SCHEDULE, 10, clip=(-bound, bound))
    # What is left above the bound is the noise of t = 1/1000, where σ = 0.029.
    assert clipped.abs().max() < bound + 5 * SCHEDULE.alpha_sigma(0.001)[1]
    # An early prediction divides by α = 0.07 at t = 1, so a range that never binds is wide.
    wide = dpm_solver_singlestep(with_class, z, SCHEDULE, 10, clip=(-1e6, 1e6))
    assert torch.equal(wide, plain)
    with pytest.raises(ValueError, match=r"clip: got \(1.0, -1.0\)"):
        dpm_solver_singlestep(with_class, z, SCHEDULE, 10, clip=(1.0, -1.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_state_keeps_its_dtype(dtype: torch.dtype) -> None:
    seen = []

    def noise_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((x.dtype, t.dtype))
        return with_class(x, t).to(torch.bfloat16)

    x = torch.randn(2, 4, 8, 8, dtype=dtype)
    assert dpm_solver_singlestep(noise_fn, x, SCHEDULE, 5).dtype == dtype
    assert set(seen) == {(dtype, torch.promote_types(dtype, torch.float32))}


def test_sampling_leaves_its_input_and_records_no_gradient() -> None:
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    before = x.detach().clone()
    sample = dpm_solver_singlestep(with_class, x, SCHEDULE, 4)
    assert not sample.requires_grad
    assert torch.equal(x.detach(), before)


# No host synchronisation: tensors without values cannot be waited for


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


# Bad input

X = torch.zeros(2, 4, 8, 8)
STEP = torch.tensor([1, 2])
LABELS = torch.tensor([1, 2])
T = torch.tensor(0.5)
CONSTANT = ConstantGuidance(1.0)


def solve(x: torch.Tensor, steps: object, noise_fn: object = with_class) -> None:
    dpm_solver_singlestep(noise_fn, x, SCHEDULE, steps)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: SCHEDULE.add_noise(X.long(), X, STEP), "x0"),
        (lambda: SCHEDULE.add_noise(X.to("meta"), X, STEP), "x0"),
        (lambda: SCHEDULE.add_noise(X, X[:1], STEP), "noise"),
        (lambda: SCHEDULE.add_noise(X, X.double(), STEP), "noise"),
        (lambda: SCHEDULE.add_noise(X, X.to("meta"), STEP), "noise"),
        (lambda: SCHEDULE.add_noise(X, X, STEP.float()), "step"),
        (lambda: SCHEDULE.add_noise(X, X, STEP[:1]), "step"),
        (lambda: SCHEDULE.add_noise(X, X, STEP - 1), "step"),
        (lambda: SCHEDULE.add_noise(X, X, STEP + 999), "step"),
        (lambda: SCHEDULE.add_noise(X, X, STEP.to("meta")), "step"),
        (lambda: SCHEDULE.condition(STEP.float()), "step"),
        (lambda: SCHEDULE.log_alpha(0.0), "t"),
        (lambda: SCHEDULE.half_log_snr(1.01), "t"),
        (lambda: SCHEDULE.alpha_sigma(math.nan), "t"),
        (lambda: SCHEDULE.time_at(math.nan), "half_log_snr"),
        (lambda: pool_noise(X, 3), "factor"),
        (lambda: pool_noise(X, 0), "factor"),
        (lambda: pool_noise(X[0], 2), "noise"),
        (lambda: multi_scale_loss([], X), "predictions"),
        (lambda: multi_scale_loss([X, X], X, (1.0,)), "coefficients"),
        (lambda: multi_scale_loss([X], X, (math.nan,)), "coefficients"),
        (lambda: multi_scale_loss([X] * 4, X), "coefficients"),
        (lambda: multi_scale_loss([X], X[0]), "noise"),
        (lambda: multi_scale_loss([X], X.long()), "noise"),
        (lambda: multi_scale_loss([X[..., :3, :3], X], X), "predictions[0]"),
        (lambda: multi_scale_loss([X[..., :4], X], X), "predictions[0]"),
        (lambda: multi_scale_loss([X, X[:1]], X), "predictions[1]"),
        (lambda: multi_scale_loss([X[..., :0, :0], X], X), "predictions[0]"),
        (lambda: multi_scale_loss([X[0]], X), "predictions[0]"),
        (lambda: ConstantGuidance(-0.1), "scale"),
        (lambda: ConstantGuidance(math.nan), "scale"),
        (lambda: PowerCosineGuidance(0.9, 1.0), "peak"),
        (lambda: PowerCosineGuidance(2.0, 0.0), "power"),
        (lambda: guided(ClassModel(), LABELS.float(), 0, CONSTANT), "y"),
        (lambda: guided(ClassModel(), LABELS[None], 0, CONSTANT), "y"),
        (lambda: guided(ClassModel(), LABELS, 0, CONSTANT)(X[:1], T), "x"),
        (lambda: guided(ClassModel(), LABELS, 0, CONSTANT)(X, T.expand(3)), "t"),
        (lambda: guided(lambda x, c, y: x[:2], LABELS, 0, CONSTANT)(X, T), "model_fn"),
        (lambda: solve(X, 0), "steps"),
        (lambda: solve(X, 2.0), "steps"),
        (lambda: solve(X, True), "steps"),
        (lambda: solve(X.long(), 3), "x"),
        (lambda: solve(X, 3, lambda x, t: x[:1]), "noise_fn"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], argument: str) -> None:
    with pytest.raises(ValueError, match=r"(got|on) .*expected|returned .*expected") as caught:
        call()
    assert str(caught.value).startswith(f"{argument}:")
