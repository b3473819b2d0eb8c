"""Rectified flow: z_t = (1 - t) z_0 + t eps, velocity v = eps - z_0 (SD3, arXiv 2403.03206), and its samplers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from iris.errors import SettingError

LOSS_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    # As IRIS's document states it. Under logit-normal(0, 1) times it is the unweighted loss under logit-normal(1, 1), scaled.
    "odds": lambda t: t / (1 - t),
}

Velocity = Callable[[Tensor, Tensor], Tensor]


def logit_normal_times(count: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """``count`` times in (0, 1), t = sigmoid(mean + std n), stratified: one draw in each of ``count`` equal-mass strata.

    Stratifying leaves each draw's distribution as it is (the strata are shuffled) and lowers the loss's variance.
    """
    strata = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    normal = math.sqrt(2) * torch.erfinv((2 * strata - 1).clamp(-1 + 1e-6, 1 - 1e-6))
    return torch.sigmoid(mean + std * normal)


def interpolate(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) z_0 + t eps for t [B] and latents [B, C, h, w]."""
    return torch.lerp(clean, noise, t.view(-1, 1, 1, 1))


def velocity_loss(predicted: Tensor, clean: Tensor, noise: Tensor, t: Tensor, weight: str = "none") -> Tensor:
    """Weighted mean squared error between predicted and true velocity eps - z_0 (a scalar).

    Raises:
        SettingError: unknown weight.
    """
    if weight not in LOSS_WEIGHTS:
        raise SettingError(f"train.loss_weight={weight!r} is unknown; allowed: {', '.join(LOSS_WEIGHTS)}")
    error = (predicted - (noise - clean)).square().mean((1, 2, 3))
    return (LOSS_WEIGHTS[weight](t) * error).mean()


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Times [steps + 1] from 1 to 0: equal steps, then t -> shift t / (1 + (shift - 1) t). Explicit, no wasted last step.

    Raises:
        SettingError: steps < 1 or shift <= 0.
    """
    if steps < 1 or shift <= 0:
        raise SettingError(f"sampling: steps={steps} must be at least 1 and shift={shift} positive")
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


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


SAMPLERS: dict[str, Callable[[Velocity, Tensor, Tensor, Tensor], Tensor]] = {
    "euler": euler_step,
    "heun": heun_step,
    "midpoint": midpoint_step,
}


def evaluations(sampler: str, steps: int, guided: bool) -> int:
    """Generator evaluations (NFE) to make one image; guidance counts twice."""
    each = {"euler": steps, "heun": 2 * steps - 1, "midpoint": 2 * steps}[sampler]
    return each * (2 if guided else 1)


def integrate(velocity: Velocity, noise: Tensor, times: Tensor, sampler: str = "euler") -> Tensor:
    """Follow dz/dt = v from ``times[0]`` to ``times[-1]``, starting at ``noise``.

    Raises:
        SettingError: unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise SettingError(f"sampler={sampler!r} is unknown; allowed: {', '.join(SAMPLERS)}")
    z = noise
    for t, following in zip(times[:-1], times[1:], strict=True):
        z = SAMPLERS[sampler](velocity, z, t, following)
    return z
