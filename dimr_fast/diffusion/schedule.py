"""Noise schedules: the factors of image and noise in the model's input at each time."""

import math
from abc import ABC, abstractmethod
from bisect import bisect, bisect_left
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Literal

import torch
from torch import Tensor

from dimr_fast.utils.validation import check_tensors


def time_condition(t: Tensor) -> Tensor:
    """Return the network's argument `log_snr` at time `t`: `8·t − 4`.

    The argument's name is historical: in the published latent recipe it is this linear function of
    time. It increases with the noise and is not a log signal-to-noise ratio.

    `t`: any shape, in (0, 1]. Returns the same shape and dtype.
    """
    return 8 * t - 4


class Schedule(ABC):
    """A variance-preserving schedule: an input at time t is `α·x0 + σ·ε` with `α² + σ² = 1`.

    Time runs from 0, the image, to 1, noise. `min_time` is the time at which solvers stop. Methods
    that take tensors compute on the tensors' device and never wait for it; methods that take a
    float compute in float64 on the host, for coefficients that are known before a sampling loop
    starts.
    """

    min_time: float

    @abstractmethod
    def draw(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Draw `count` times to train at, uniform, from the global random state of `device`."""

    def draw_normal(
        self, count: int, mean: float, std: float, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw `count` times to train at, so that `λ = log(α/σ)` is normal, and limited to [0, 1].

        The global random state of the CPU decides. Returns what `draw` returns, on `device`.
        λ of mean 0.5 and standard deviation 1.2 are the noise levels of EDM (Karras et al. 2022,
        arXiv 2206.00364, table 1, for data of variance 1); 0 and 1 those of rectified flow at
        logit-normal times (Esser et al. 2024, arXiv 2403.03206). Raises ValueError if `mean` is not
        finite or `std` not positive and finite.
        """
        if not math.isfinite(mean) or not 0 < std < math.inf:
            raise ValueError(
                f"mean, std: got {mean}, {std}, expected a finite and a positive finite number"
            )
        lowest, highest = self.half_log_snr(1), self.half_log_snr(self.min_time)
        values = mean + std * torch.randn(count, dtype=torch.float64, device="cpu")
        times = map(self.time_at, values.clamp(lowest, highest).tolist())
        return self._training_times(torch.tensor(list(times), dtype=torch.float64)).to(device)

    @abstractmethod
    def _training_times(self, t: Tensor) -> Tensor:
        """Return times t, float64 in (0, 1], as `draw` would."""

    @abstractmethod
    def snr(self, time: Tensor, /) -> Tensor:
        """Return the signal-to-noise ratio `α²/σ²`, float64, at times [B] as `draw` returns them.

        Raises ValueError as `add_noise` does for these times.
        """

    @abstractmethod
    def add_noise(self, x0: Tensor, noise: Tensor, time: Tensor, /) -> Tensor:
        """Return the noisy input `α·x0 + σ·noise`, each image at its own time, as `draw` returns.

        `x0`, `noise`: [B, ...], floating point. `time`: [B]. Returns the shape and dtype of `x0`.

        Raises ValueError for wrong shapes, dtypes or devices, and on the CPU for a time out of
        range.

        Source: Ho et al. 2020, arXiv 2006.11239, equation 4.
        """

    @abstractmethod
    def condition(self, time: Tensor, /) -> Tensor:
        """Return the network's argument `log_snr` at times of any shape, as `draw` returns them."""

    @abstractmethod
    def condition_at(self, t: Tensor) -> Tensor:
        """Return the network's argument `log_snr` at times t in (0, 1], as solvers pass them."""

    @abstractmethod
    def beta(self, t: float) -> float:
        """Return the rate `β = −2·d log α/dt` at which noise replaces the image at time `t`.

        Raises ValueError for `t` outside [min_time, 1].
        """

    @abstractmethod
    def log_alpha(self, t: float) -> float:
        """Return `log α` at time `t`. Raises ValueError for `t` outside [min_time, 1]."""

    @abstractmethod
    def _time_of(self, log_alpha: float) -> float:
        """Return the time of `log α`: the inverse of `log_alpha(t)`, extrapolated at the ends."""

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        """Return the factors of image and noise at time `t`, `α` and `σ = √(1 − α²)`.

        Raises ValueError for `t` outside [min_time, 1].
        """
        log_alpha = self.log_alpha(t)
        return math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha))

    def half_log_snr(self, t: float) -> float:
        """Return `λ = log(α/σ)` at time `t`; it decreases with `t`.

        Raises ValueError for `t` outside [min_time, 1].
        """
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * math.log(-math.expm1(2 * log_alpha))

    def time_at(self, half_log_snr: float) -> float:
        """Return the time `t` at which `λ` is `half_log_snr`: the inverse of `half_log_snr(t)`.

        Values slightly outside the schedule (from rounding) are extrapolated. Raises ValueError if
        `half_log_snr` is not finite.
        """
        if not math.isfinite(half_log_snr):
            raise ValueError(f"half_log_snr: got {half_log_snr}, expected a finite number")
        # log α = −½·log(1 + exp(−2λ)), written so that the exponential cannot overflow.
        return self._time_of(
            min(half_log_snr, 0.0) - 0.5 * math.log1p(math.exp(-2 * abs(half_log_snr)))
        )


class DiscreteSchedule(Schedule):
    """The 1000-step schedule of Stable Diffusion, interpolated between its steps.

    `β = linspace(√0.00085, √0.012, 1000)²` and `ᾱ_n = Π (1 − β)`. Step `n` in 1..1000 is time
    `t = n/1000`; an input at step `n` is `√ᾱ_n·x0 + √(1 − ᾱ_n)·ε`.

    `betas`, `alphas_cumprod`: float64 [1000] on `device`; step `n` is entry `n − 1`. Methods that
    take tensors compute on that device. `draw` returns steps.

    Source: Rombach et al. 2022, arXiv 2112.10752 (the values); Lu et al. 2022, arXiv 2206.00927
    (discrete-time models in continuous time).
    """

    num_steps = 1000
    min_time = 1 / num_steps

    def __init__(self, device: torch.device | str = "cpu") -> None:
        first, last = math.sqrt(0.00085), math.sqrt(0.012)
        stride = (last - first) / (self.num_steps - 1)
        betas = [(first + n * stride) ** 2 for n in range(self.num_steps)]
        alphas_cumprod = list(accumulate((1 - beta for beta in betas), mul))
        self._times = [n / self.num_steps for n in range(1, self.num_steps + 1)]
        self._log_alphas = [0.5 * math.log(value) for value in alphas_cumprod]
        self.betas = torch.tensor(betas, dtype=torch.float64, device=device)
        self.alphas_cumprod = torch.tensor(alphas_cumprod, dtype=torch.float64, device=device)

    def draw(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Draw `count` steps, int64, uniform on 1..1000, from the random state of `device`."""
        return torch.randint(1, self.num_steps + 1, (count,), device=device)

    def _training_times(self, t: Tensor) -> Tensor:
        return (t * self.num_steps).round().long().clamp(1, self.num_steps)

    def snr(self, step: Tensor) -> Tensor:
        """Return the signal-to-noise ratio `ᾱ_n/(1 − ᾱ_n)`, float64, of steps [B]."""
        _check_step(step)
        kept = self._alphas_cumprod_at(step)
        return kept / (1 - kept)

    def add_noise(self, x0: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """Return the noisy input `√ᾱ_n·x0 + √(1 − ᾱ_n)·noise`, each image at its own step.

        `x0`, `noise`: [B, ...], floating point. `step`: integer [B] in 1..1000. All on the
        schedule's device. Returns the shape and dtype of `x0`.

        Raises ValueError for wrong shapes, dtypes or devices. A step outside 1..1000 raises
        ValueError on the CPU and triggers a device assertion on a GPU, where a check would have to
        wait for the device.

        Source: Ho et al. 2020, arXiv 2006.11239, equation 4.
        """
        _check_step(step)
        _check_inputs(x0, noise, self.alphas_cumprod.device, step=step)
        kept = self._alphas_cumprod_at(step)
        return _mix(x0, noise, kept.sqrt(), (1 - kept).sqrt())

    def condition(self, step: Tensor) -> Tensor:
        """Return the network's `log_snr` at a discrete step, `8·n/1000 − 4` (see `time_condition`).

        `step`: integer, any shape, in 1..1000. Returns float32 of the same shape, in (−4, 4].
        Raises ValueError for another dtype.
        """
        _check_step(step)
        return time_condition(step.to(torch.float32) / self.num_steps)

    def condition_at(self, t: Tensor) -> Tensor:
        """Return the network's `log_snr` at times t in (0, 1], `8·t − 4` (see `time_condition`)."""
        return time_condition(t)

    def beta(self, t: float) -> float:
        """Return `β = −2·d log α/dt`, which is constant between two steps: `−1000·log(1 − β_n)`.

        At a step it is the rate of the interval below. Raises ValueError for `t` outside
        [1/1000, 1].
        """
        self._check_time(t)
        step = bisect_left(self._times, t)
        before = self._log_alphas[step - 1] if step else 0.0
        return -2 * self.num_steps * (self._log_alphas[step] - before)

    def log_alpha(self, t: float) -> float:
        """Return `log √ᾱ` at time `t`, linear in `t` between the steps.

        Raises ValueError for `t` outside [1/1000, 1].
        """
        self._check_time(t)
        return _interpolate(t, self._times, self._log_alphas)

    def _time_of(self, log_alpha: float) -> float:
        return _interpolate(log_alpha, self._log_alphas[::-1], self._times[::-1])

    def _alphas_cumprod_at(self, step: Tensor) -> Tensor:
        try:
            # Unlike indexing, index_select refuses index -1, which step 0 gives.
            return self.alphas_cumprod.index_select(0, step.long() - 1)
        except IndexError as error:
            raise ValueError(
                f"step: got values in {step.min().item()}..{step.max().item()}, "
                f"expected 1..{self.num_steps}"
            ) from error

    def _check_time(self, t: float) -> None:
        if not self._times[0] <= t <= self._times[-1]:
            raise ValueError(f"t: got {t}, expected a time in [1/{self.num_steps}, 1]")


class VPSDE(Schedule):
    """The continuous-time schedule of the published pixel models: `β(t) = 0.1 + 19.9·t`.

    The variance-preserving SDE `dx = −½·β·x dt + √β dw` gives `α² = exp(−∫₀ᵗ β)`. The condition is
    the log signal-to-noise ratio `log(α²/σ²)`, limited to ±log 10⁶ as in the published code: at
    t = 0 it would be infinite. Solvers stop at t = 10⁻⁴.

    Source: Song et al. 2021, arXiv 2011.13456, equation 11 and appendix C.
    """

    beta_min, beta_max = 0.1, 20.0
    min_time = 1e-4
    max_log_snr = math.log(1e6)

    def draw(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Draw `count` times, float32, uniform in [0, 1), from the random state of `device`."""
        return torch.rand(count, dtype=torch.float32, device=device)

    def _training_times(self, t: Tensor) -> Tensor:
        return t.float()

    def snr(self, t: Tensor) -> Tensor:
        """Return the signal-to-noise ratio, float64, at times [B] in [0, 1]; infinite at 0."""
        self._check_times(t)
        return 1 / self._integral(t.double()).expm1()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the noisy input `α·x0 + σ·noise`, each image at its own time.

        `x0`, `noise`: [B, ...], floating point. `t`: floating point [B] in [0, 1]. All on one
        device. Returns the shape and dtype of `x0`.

        Raises ValueError for wrong shapes, dtypes or devices. A time outside [0, 1] raises
        ValueError on the CPU only: on a GPU a check would have to wait for the device.
        """
        self._check_times(t)
        _check_inputs(x0, noise, None, t=t)
        exponent = -self._integral(t.double())
        return _mix(x0, noise, (0.5 * exponent).exp(), (-exponent.expm1()).sqrt())

    def condition(self, t: Tensor) -> Tensor:
        """Return the log signal-to-noise ratio at times in [0, 1]: shape and dtype of `t`.

        Raises ValueError as `add_noise` does.
        """
        self._check_times(t)
        log_snr = -self._integral(t.double()).expm1().log()
        return log_snr.clamp(-self.max_log_snr, self.max_log_snr).to(t.dtype)

    def condition_at(self, t: Tensor) -> Tensor:
        """Return the log signal-to-noise ratio at times t in [0, 1]: the same as `condition`."""
        return self.condition(t)

    def beta(self, t: float) -> float:
        """Return `β` at time `t`. Raises ValueError for `t` outside [10⁻⁴, 1]."""
        self._check_time(t)
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def log_alpha(self, t: float) -> float:
        """Return `log α = −½·∫₀ᵗ β` at time `t`. Raises ValueError for `t` outside [10⁻⁴, 1]."""
        self._check_time(t)
        return -0.5 * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t) * t

    def _time_of(self, log_alpha: float) -> float:
        # The root of ½·slope·t² + β_min·t + 2·log α in the form without cancellation.
        slope = self.beta_max - self.beta_min
        root = math.sqrt(max(self.beta_min**2 - 4 * slope * log_alpha, 0.0))
        return -4 * log_alpha / (self.beta_min + root)

    def _integral(self, t: Tensor) -> Tensor:
        """Return `∫₀ᵗ β`."""
        return (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t) * t

    def _check_time(self, t: float) -> None:
        if not self.min_time <= t <= 1:
            raise ValueError(f"t: got {t}, expected a time in [{self.min_time}, 1]")

    @staticmethod
    def _check_times(t: Tensor) -> None:
        check_tensors(t=t)
        if not t.is_floating_point():
            raise ValueError(f"t: got {t.dtype}, expected floating-point times")
        if t.device.type == "cpu" and not ((t >= 0) & (t <= 1)).all():
            raise ValueError(f"t: got values in {t.min().item()}..{t.max().item()}, expected 0..1")


ScheduleName = Literal["discrete", "vp-sde"]


def noise_schedule(name: ScheduleName, device: torch.device | str = "cpu") -> Schedule:
    """Return the schedule of a name: `DiscreteSchedule` on `device`, or `VPSDE`."""
    return DiscreteSchedule(device) if name == "discrete" else VPSDE()


def _check_inputs(x0: Tensor, noise: Tensor, device: torch.device | None, **times: Tensor) -> None:
    """Check the arguments of `add_noise`, which are on `device`, or on that of `x0` if it is None.

    `times`: the one argument with the time of each image, by name; not its dtype and range.
    """
    check_tensors(x0=x0, noise=noise)
    if not x0.is_floating_point() or x0.ndim < 1:
        raise ValueError(
            f"x0: got {x0.dtype} {tuple(x0.shape)}, expected a floating-point batch [B, ...]"
        )
    if noise.shape != x0.shape or noise.dtype != x0.dtype:
        raise ValueError(
            f"noise: got {noise.dtype} {tuple(noise.shape)}, expected that of x0, "
            f"{x0.dtype} {tuple(x0.shape)}"
        )
    for name, time in times.items():
        if time.shape != x0.shape[:1]:
            raise ValueError(
                f"{name}: got shape {tuple(time.shape)}, expected one per image, ({x0.shape[0]},)"
            )
    expected = "that of x0," if device is None else "the schedule's"
    device = x0.device if device is None else device
    for name, tensor in {"x0": x0, "noise": noise, **times}.items():
        if tensor.device != device:
            raise ValueError(f"{name}: on {tensor.device}, expected {expected} {device}")


def _mix(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return `α·x0 + σ·noise` for float64 factors [B], rounded to the dtype of `x0`."""
    alpha, sigma = (rate.view(-1, *[1] * (x0.ndim - 1)).to(x0.dtype) for rate in (alpha, sigma))
    return alpha * x0 + sigma * noise


def _check_step(step: Tensor) -> None:
    check_tensors(step=step)
    if step.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"step: got {step.dtype}, expected int32 or int64")


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Interpolate linearly through (xs, ys), xs ascending; extrapolate beyond the ends."""
    right = min(max(bisect(xs, x), 1), len(xs) - 1)
    left = right - 1
    return ys[left] + (x - xs[left]) * (ys[right] - ys[left]) / (xs[right] - xs[left])
