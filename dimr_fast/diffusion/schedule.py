"""The noise schedule: the factors of image and noise in the model's input at each time."""

import math
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

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


class DiscreteSchedule:
    """The 1000-step schedule of Stable Diffusion, interpolated between its steps.

    `β = linspace(√0.00085, √0.012, 1000)²` and `ᾱ_n = Π (1 − β)`. Step `n` in 1..1000 is time
    `t = n/1000`; an input at step `n` is `√ᾱ_n·x0 + √(1 − ᾱ_n)·ε`.

    `betas`, `alphas_cumprod`: float64 [1000] on `device`; step `n` is entry `n − 1`. Methods that
    take tensors compute on that device and never wait for it; methods that take a float compute in
    float64 on the host, for coefficients that are known before a sampling loop starts.

    Source: Rombach et al. 2022, arXiv 2112.10752 (the values); Lu et al. 2022, arXiv 2206.00927
    (discrete-time models in continuous time).
    """

    num_steps = 1000

    def __init__(self, device: torch.device | str = "cpu") -> None:
        first, last = math.sqrt(0.00085), math.sqrt(0.012)
        stride = (last - first) / (self.num_steps - 1)
        betas = [(first + n * stride) ** 2 for n in range(self.num_steps)]
        alphas_cumprod = list(accumulate((1 - beta for beta in betas), mul))
        self._times = [n / self.num_steps for n in range(1, self.num_steps + 1)]
        self._log_alphas = [0.5 * math.log(value) for value in alphas_cumprod]
        self.betas = torch.tensor(betas, dtype=torch.float64, device=device)
        self.alphas_cumprod = torch.tensor(alphas_cumprod, dtype=torch.float64, device=device)

    def add_noise(self, x0: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """Return the noisy input `√ᾱ_n·x0 + √(1 − ᾱ_n)·noise`, each image at its own step.

        `x0`, `noise`: [B, ...], floating point. `step`: integer [B] in 1..1000. All on the
        schedule's device. Returns the shape and dtype of `x0`.

        Raises ValueError for wrong shapes, dtypes or devices. A step outside 1..1000 raises
        ValueError on the CPU and triggers a device assertion on a GPU, where a check would have to
        wait for the device.

        Source: Ho et al. 2020, arXiv 2006.11239, equation 4.
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
        _check_step(step)
        if step.shape != x0.shape[:1]:
            raise ValueError(
                f"step: got shape {tuple(step.shape)}, expected one per image, ({x0.shape[0]},)"
            )
        device = self.alphas_cumprod.device
        for name, tensor in (("x0", x0), ("noise", noise), ("step", step)):
            if tensor.device != device:
                raise ValueError(f"{name}: on {tensor.device}, expected the schedule's {device}")
        try:
            # Unlike indexing, index_select refuses index -1, which step 0 gives.
            kept = self.alphas_cumprod.index_select(0, step.long() - 1)
        except IndexError as error:
            raise ValueError(
                f"step: got values in {step.min().item()}..{step.max().item()}, "
                f"expected 1..{self.num_steps}"
            ) from error
        kept = kept.view(-1, *[1] * (x0.ndim - 1))
        return kept.sqrt().to(x0.dtype) * x0 + (1 - kept).sqrt().to(x0.dtype) * noise

    def condition(self, step: Tensor) -> Tensor:
        """Return the network's `log_snr` at a discrete step, `8·n/1000 − 4` (see `time_condition`).

        `step`: integer, any shape, in 1..1000. Returns float32 of the same shape, in (−4, 4].
        Raises ValueError for another dtype.
        """
        _check_step(step)
        return time_condition(step.to(torch.float32) / self.num_steps)

    def log_alpha(self, t: float) -> float:
        """Return `log √ᾱ` at time `t`, linear in `t` between the steps.

        Raises ValueError for `t` outside [1/1000, 1].
        """
        if not self._times[0] <= t <= self._times[-1]:
            raise ValueError(f"t: got {t}, expected a time in [1/{self.num_steps}, 1]")
        return _interpolate(t, self._times, self._log_alphas)

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        """Return the factors of image and noise at time `t`: `α = √ᾱ` and `σ = √(1 − α²)`.

        Raises ValueError for `t` outside [1/1000, 1].
        """
        log_alpha = self.log_alpha(t)
        return math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha))

    def half_log_snr(self, t: float) -> float:
        """Return `λ = log(α/σ)` at time `t`; it decreases with `t`.

        Raises ValueError for `t` outside [1/1000, 1].
        """
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * math.log(-math.expm1(2 * log_alpha))

    def time_at(self, half_log_snr: float) -> float:
        """Return the time `t` at which `λ` is `half_log_snr`: the inverse of `half_log_snr(t)`.

        Values slightly outside the schedule (from rounding) are extrapolated linearly. Raises
        ValueError if `half_log_snr` is not finite.
        """
        if not math.isfinite(half_log_snr):
            raise ValueError(f"half_log_snr: got {half_log_snr}, expected a finite number")
        # log α = −½·log(1 + exp(−2λ)), written so that the exponential cannot overflow.
        log_alpha = min(half_log_snr, 0.0) - 0.5 * math.log1p(math.exp(-2 * abs(half_log_snr)))
        return _interpolate(log_alpha, self._log_alphas[::-1], self._times[::-1])


def _check_step(step: Tensor) -> None:
    check_tensors(step=step)
    if step.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"step: got {step.dtype}, expected int32 or int64")


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Interpolate linearly through (xs, ys), xs ascending; extrapolate beyond the ends."""
    right = min(max(bisect(xs, x), 1), len(xs) - 1)
    left = right - 1
    return ys[left] + (x - xs[left]) * (ys[right] - ys[left]) / (xs[right] - xs[left])
