"""Distillation of a rectified flow: what few-step students aim at, and the teacher that they learn it from.

Both methods evaluate networks and nothing else, so that every mixer can be distilled. MeanFlow (arXiv 2505.13447) would
need forward-mode derivatives, which the scan's autograd.Function and fused attention do not have; finite differences in
their place divide float32's rounding by the step. Shortcut models learn the same quantity, the mean velocity of a step,
from two half steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from iris.diffusion.flow import time_grid
from iris.diffusion.guidance import TOLERANCE
from iris.nn.condition import TextCondition
from iris.nn.generator import Generator

SOLVERS = ("euler", "heun")

# Latents z [B, ...] at times t [B] -> their velocity [B, ...]; every row has a time of its own.
RowVelocity = Callable[[Tensor, Tensor], Tensor]


def move(z: Tensor, velocity: Tensor, t: Tensor, to: Tensor) -> Tensor:
    """z + (to - t) velocity: latents [B, ...] moved from times t [B] to times ``to`` [B].

    With the velocity of a student and ``to`` = 0 it is the consistency function f(z, t) = z - t v; f(z, 0) = z holds by
    itself, whatever the network.
    """
    return z + _over(to - t, z) * velocity


def solve(velocity: RowVelocity, z: Tensor, t: Tensor, to: Tensor, solver: str = "euler", steps: int = 1) -> Tensor:
    """The latents to which ``velocity`` carries z [B, ...] from times t [B] to ``to`` [B], in equal steps.

    As ``iris.diffusion.flow.heun_step``, heun ends with an Euler step at time 0, where no network has been trained.
    """
    for k in range(steps):
        here, there = torch.lerp(t, to, k / steps), torch.lerp(t, to, (k + 1) / steps)
        slope = velocity(z, here)
        if solver == "heun":
            mean = (slope + velocity(move(z, slope, here, there), there)) / 2
            slope = torch.where(_over(there, z) > 0, mean, slope)
        z = move(z, slope, here, there)
    return z


def consistency_target(student: RowVelocity, ahead: Tensor, t: Tensor, end: Tensor) -> Tensor:
    """f at ``ahead`` [B, ...], where the teacher came to at times t [B]: the student's jump from there to ``end`` [B].

    Where t = ``end`` it is ``ahead`` itself.
    """
    return move(ahead, student(ahead, t), t, end)


def shortcut_target(student: Callable[[Tensor, Tensor, Tensor], Tensor], z: Tensor, t: Tensor, level: Tensor) -> Tensor:
    """The mean velocity of a step of 2^-level from times t [B]: that of the student's two half steps.

    Args:
        student: of z [B, ...], t [B] and the level [B] of its step -> mean velocity [B, ...].
    """
    middle = t - torch.exp2(-(level + 1.0)).to(t)
    first = student(z, t, level + 1)
    second = student(move(z, first, t, middle), middle, level + 1)
    return (first + second) / 2


def pseudo_huber(predicted: Tensor, target: Tensor, delta: float) -> Tensor:
    """Mean over all elements of sqrt(d^2 + delta^2) - delta: squared for small differences d, absolute for large ones.

    In float32 at least: half precision does not hold the difference of 1 + delta^2 from 1.
    """
    wide = torch.promote_types(predicted.dtype, torch.float32)
    return ((predicted.to(wide) - target.to(wide)).square() + delta**2).sqrt().mean() - delta


def rising_grid(count: int, shift: float = 1.0) -> Tensor:
    """Times [count + 1] from 0 to 1, those at which a sampler of ``count`` steps and this shift evaluates, and 0."""
    return time_grid(count, shift).flip(0)


def guided(
    generator: Generator,
    text: TextCondition,
    null: TextCondition | None,
    scale: Tensor,
    interval: tuple[float, float],
    iterations: int | None = None,
) -> RowVelocity:
    """The velocity that guidance makes of a teacher: v_u + scale (v_c - v_u) inside the interval of times, v_c outside.

    Args:
        text, null: conditions of the rows, [B, ...]; without ``null`` the conditional velocity alone.
        scale: of each row [B].
    """
    if null is None:
        return lambda z, t: generator(z, t, text, iterations).to(z.dtype)
    both = TextCondition(*(torch.cat(halves) for halves in zip(text, null, strict=True)))
    start, end = interval

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        halves = generator(torch.cat([z, z]), torch.cat([t, t]), both, iterations).to(z.dtype)
        conditional, unconditional = halves.chunk(2)
        inside = (t >= start - TOLERANCE) & (t <= end + TOLERANCE)
        return torch.lerp(unconditional, conditional, _over(torch.where(inside, scale, 1.0), z).to(z.dtype))

    return velocity


def _over(t: Tensor, z: Tensor) -> Tensor:
    """t [B] shaped to be broadcast over z [B, ...]."""
    return t.view(-1, *(1,) * (z.dim() - 1))
