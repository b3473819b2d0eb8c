"""Rectified flow: z_t = (1 - t) z_0 + t eps, velocity v = eps - z_0 (SD3, arXiv 2403.03206), and its samplers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from iris.errors import SettingError, require_choice

Velocity = Callable[[Tensor, Tensor], Tensor]

TIME_KINDS = ("logit_normal", "uniform", "mode")
# Training times stay inside: at 1 the odds weight is infinite, at 0 there is nothing left to predict.
TIME_RANGE = (1e-6, 1 - 1e-6)
# Beyond these scales SD3's mode density is no density: its quantile function is not monotone.
MODE_SCALES = (-1.0, 2 / (math.pi - 2))


@dataclass(frozen=True)
class TimeSampling:
    """The distribution of training times (SD3, section 3.1), and the resolution shift applied to it.

    Args:
        kind: ``logit_normal``: t = sigmoid(mean + std n); ``uniform``; ``mode``: of a uniform u,
            t = 1 - u - scale (cos^2(pi u / 2) - 1 + u), denser in the middle for a positive scale, at the ends for a
            negative one.
        shift: t -> shift t / (1 + (shift - 1) t), which adds ln(shift) to the logit; see ``resolution_shift``.

    Raises:
        SettingError: an unknown kind, or a number outside its range.
    """

    kind: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    scale: float = 1.29
    shift: float = 1.0

    def __post_init__(self) -> None:
        require_choice("train.time", self.kind, TIME_KINDS)
        if not math.isfinite(self.mean):
            raise SettingError(f"train.time_mean={self.mean} must be finite")
        if not MODE_SCALES[0] <= self.scale <= MODE_SCALES[1]:
            raise SettingError(f"train.time_scale={self.scale} must lie in [-1, 2 / (pi - 2) = {MODE_SCALES[1]:.3f}]")
        for name in ("std", "shift"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingError(f"train.time_{name}={getattr(self, name)} must be positive and finite")

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """``count`` times in (0, 1), stratified: one draw in each of ``count`` equal-mass strata.

        Stratifying leaves each draw's distribution as it is (the strata are shuffled) and lowers the loss's variance.
        """
        strata = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        return self.at(strata)

    def at(self, uniform: Tensor) -> Tensor:
        """The times that uniform draws u in [0, 1] map to; never 0 or 1 themselves."""
        if self.kind == "logit_normal":
            normal = math.sqrt(2) * torch.erfinv((2 * uniform - 1).clamp(-1 + 1e-6, 1 - 1e-6))
            t = torch.sigmoid(self.mean + self.std * normal)
        elif self.kind == "mode":
            t = 1 - uniform - self.scale * (torch.cos(math.pi / 2 * uniform).square() - 1 + uniform)
        else:
            t = uniform
        return shifted(t, self.shift).clamp(*TIME_RANGE)


def shifted(t: Tensor, shift: float) -> Tensor:
    """shift t / (1 + (shift - 1) t): the time at which a grid ``shift``^2 times as large is as noisy as at t."""
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(tokens: int, base_tokens: int) -> float:
    """sqrt(tokens / base_tokens), the shift for a grid of ``tokens`` when ``base_tokens`` needs none (SD3, eq. 23).

    The mean of m tokens that show the same thing has noise 1 / sqrt(m), so a larger picture needs more noise to be as
    hidden. SD3 takes 3 at 1,024 pixels.

    Raises:
        SettingError: a count below 1.
    """
    if tokens < 1 or base_tokens < 1:
        raise SettingError(f"resolution_shift: tokens={tokens} and base_tokens={base_tokens} must be at least 1")
    return math.sqrt(tokens / base_tokens)


def odds(t: Tensor, gamma: float) -> Tensor:
    """t / (1 - t) = exp(logit t), as IRIS's document states it.

    Under logit-normal(0, 1) times it is e^(1/2) times the unweighted loss under logit-normal(1, 1), with 1/e of its
    effective batch; under uniform times its mean is infinite. In float32 at least, where 1 - t is exact for t >= 1/2:
    half precision would round it to 0.
    """
    t = t.to(torch.promote_types(t.dtype, torch.float32)).clamp(*TIME_RANGE)
    return t / (1 - t)


def min_snr(t: Tensor, gamma: float) -> Tensor:
    """Min-SNR-gamma (arXiv 2303.09556) for the velocity of the rectified flow: min((1 - t)^2, gamma t^2).

    The paper weighs the squared error of z_0 by min(SNR, gamma). Here SNR = ((1 - t) / t)^2, and by z_0 = z_t - t v the
    error of z_0 is t times that of v: the velocity's weight is t^2 min(SNR, gamma). The paper's weight of the noise's
    error, min(SNR, gamma) / SNR, leads to the same, since eps = z_t + (1 - t) v.
    """
    return torch.minimum((1 - t).square(), gamma * t.square())


# Each takes times [B] and train.min_snr_gamma to weights [B] of the velocity's squared error.
LOSS_WEIGHTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda t, gamma: torch.ones_like(t),
    "odds": odds,
    "min_snr": min_snr,
}


def check_weight(weight: str, gamma: float) -> None:
    """Raise a SettingError unless ``weight`` is one of ``LOSS_WEIGHTS`` and ``gamma`` positive."""
    require_choice("train.loss_weight", weight, tuple(LOSS_WEIGHTS))
    if not gamma > 0:
        raise SettingError(f"train.min_snr_gamma={gamma} must be positive")


def interpolate(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) z_0 + t eps for t [B] and latents [B, C, h, w]."""
    return torch.lerp(clean, noise, t.view(-1, 1, 1, 1))


def weighted_error(predicted: Tensor, target: Tensor, t: Tensor, weight: str = "none", gamma: float = 5.0) -> Tensor:
    """Mean over the batch of weight(t) times each sample's mean squared error: t [B], others [B, C, h, w] -> scalar.

    Raises:
        SettingError: unknown weight, or gamma not positive.
    """
    check_weight(weight, gamma)
    error = (predicted - target).square().mean((1, 2, 3))
    return (LOSS_WEIGHTS[weight](t, gamma) * error).mean()


def velocity_loss(
    predicted: Tensor, clean: Tensor, noise: Tensor, t: Tensor, weight: str = "none", gamma: float = 5.0
) -> Tensor:
    """Weighted mean squared error between predicted and true velocity eps - z_0 (a scalar).

    Raises:
        SettingError: unknown weight, or gamma (of ``min_snr``) not positive.
    """
    return weighted_error(predicted, noise - clean, t, weight, gamma)


def time_grid(steps: int, shift: float = 1.0, start: float = 1.0) -> Tensor:
    """Times [steps + 1] from ``start`` to 0: equal steps, then t -> shift t / (1 + (shift - 1) t).

    ``start`` is the noise level itself, after the shift, as image-to-image needs it (its strength).

    Every step counts. diffusers' flow schedulers left to themselves take linspace(1, 1/1000, steps), then 0: four steps
    go 1, 0.667, 0.334, 0.001, 0, which is three steps and an evaluation that moves the latent by a thousandth; a shift
    is even applied twice to that last time. Given sigmas=time_grid(steps)[:-1] they follow this grid.

    Raises:
        SettingError: steps < 1, shift <= 0, or start outside (0, 1].
    """
    if steps < 1 or not shift > 0:
        raise SettingError(f"sampling: steps={steps} must be at least 1 and shift={shift} positive")
    if not 0 < start <= 1:
        raise SettingError(f"sampling: start={start} must lie in (0, 1]")
    unshifted = start / (shift + (1 - shift) * start)
    times = shifted(torch.linspace(unshifted, 0, steps + 1), shift)
    times[0] = start
    return times


def euler_step(velocity: Velocity, z: Tensor, t: Tensor, following: Tensor) -> Tensor:
    """One evaluation: z + (s - t) v(z, t)."""
    return z + (following - t) * velocity(z, t)


def heun_step(velocity: Velocity, z: Tensor, t: Tensor, following: Tensor) -> Tensor:
    """Two evaluations (one for the last step, where v at t = 0 would only echo the estimate)."""
    slope = velocity(z, t)
    ahead = z + (following - t) * slope
    if following == 0:
        return ahead
    return z + (following - t) * (slope + velocity(ahead, following)) / 2


def midpoint_step(velocity: Velocity, z: Tensor, t: Tensor, following: Tensor) -> Tensor:
    """Two evaluations: the slope at the middle of the step."""
    middle = (t + following) / 2
    return z + (following - t) * velocity(z + (middle - t) * velocity(z, t), middle)


def stochastic_step(velocity: Velocity, z: Tensor, t: Tensor, following: Tensor, noise: Tensor | None = None) -> Tensor:
    """One evaluation: the estimate z - t v of the clean latent, noised anew to the next time.

    The multistep sampler of consistency models (arXiv 2303.01469). Without ``noise``, as at the end, the estimate.
    """
    estimate = z - t * velocity(z, t)
    return estimate if noise is None else (1 - following) * estimate + following * noise


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": euler_step,
    "heun": heun_step,
    "midpoint": midpoint_step,
    "stochastic": stochastic_step,
}


def integrate(
    velocity: Velocity,
    z: Tensor,
    times: Tensor,
    sampler: str = "euler",
    noise_at: Callable[[int], Tensor] | None = None,
    after: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Follow dz/dt = v from ``z`` at ``times[0]`` to ``times[-1]``.

    ``times`` from 1 to 0 makes a sample of noise; from 0 to 1, it finds the noise of a picture (inversion).

    Args:
        velocity: of z [B, ...] at a time (a scalar).
        noise_at: for ``stochastic``, the unit noise [B, ...] of step i, so that it can be addressed by image and step.
        after: called with i, times[i + 1] and the latent that step i came to; returns the latent to go on with.

    Raises:
        SettingError: unknown sampler, times neither falling nor rising, or ``stochastic`` without ``noise_at``.
    """
    require_choice("sampler", sampler, tuple(SAMPLERS))
    if not ((times.diff() < 0).all() or (times.diff() > 0).all()):
        raise SettingError(f"sampling: times={times.tolist()} must fall or rise throughout")
    if sampler == "stochastic" and noise_at is None and (times[1:] != 0).any():
        raise SettingError("sampler='stochastic' needs noise_at, the noise of every step but the last")
    for index, (t, following) in enumerate(itertools.pairwise(times)):
        fresh = (noise_at(index),) if sampler == "stochastic" and following != 0 else ()
        z = SAMPLERS[sampler](velocity, z, t, following, *fresh)
        if after is not None:
            z = after(index, following, z)
    return z


def evaluation_times(sampler: str, times: Tensor) -> list[float]:
    """At which times ``integrate`` evaluates the velocity, in order: found by integrating a constant.

    Raises:
        SettingError: as ``integrate``.
    """
    seen: list[float] = []

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t))
        return z

    integrate(velocity, torch.zeros(1), times, sampler, noise_at=lambda step: torch.zeros(1))
    return seen
