"""Classifier-free guidance (arXiv 2207.12598) of the flow's velocity, in an interval of times, rescaled or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from iris.diffusion.flow import evaluation_times
from iris.errors import SettingError

# Times of a grid are float32, bounds are Python's floats: 0.3 must lie in [0.1, 0.3].
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Guidance:
    """v = v_u + scale (v_c - v_u) at times in [start, end], the conditional velocity v_c alone elsewhere.

    Args:
        scale: 1 means none, 0 the unconditional velocity.
        start, end: the interval, in flow time (0 data, 1 noise). Guidance harms at high noise levels and hardly matters
            at low ones (arXiv 2404.07724, whose noise level sigma is t / (1 - t)); outside it an evaluation is saved.
        rescale: how far the guided estimate of the clean latent is brought back to the deviation of the conditional one
            (arXiv 2305.08891, section 3.4, where 0.7 is used); 0 means not at all.

    Raises:
        SettingError: a number outside its range.
    """

    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    rescale: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise SettingError(f"sample.guidance={self.scale} must be finite and at least 0")
        if not 0 <= self.start <= self.end <= 1:
            raise SettingError(
                f"sample.guidance_start={self.start} and sample.guidance_end={self.end} must lie in "
                "[0, 1], in this order"
            )
        if not 0 <= self.rescale <= 1:
            raise SettingError(f"sample.guidance_rescale={self.rescale} must lie in [0, 1]")

    def active(self, t: float | Tensor) -> bool:
        """Whether the velocity at time t needs the unconditional half as well."""
        return self.scale != 1 and self.start - TOLERANCE <= float(t) <= self.end + TOLERANCE

    def velocity(self, model: Callable[[Tensor, Tensor, bool], Tensor], z: Tensor, t: Tensor) -> Tensor:
        """The guided velocity [B, ...] of z [B, ...] at time t (a scalar).

        Args:
            model: called with z, t and whether both halves are wanted; returns the conditional velocity [B, ...], or
                it and below it the unconditional one [2B, ...].
        """
        if not self.active(t):
            return model(z, t, False)
        conditional, unconditional = model(z, t, True).chunk(2)
        guided = torch.lerp(unconditional, conditional, self.scale)
        return self._rescaled(guided, conditional, z, t) if self.rescale > 0 else guided

    def _rescaled(self, guided: Tensor, conditional: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The velocity whose estimate of the clean latent has been rescaled.

        The estimate z - t v, not v: too much contrast is a fault of the picture, and a velocity made smaller as a whole
        would also take out less noise than there is.
        """
        if t == 0:  # nothing is estimated: z is the clean latent
            return guided
        axes = tuple(range(1, z.dim()))
        estimate = z - t * guided
        factor = (z - t * conditional).std(axes, keepdim=True) / estimate.std(axes, keepdim=True)
        return guided + self.rescale * (1 - factor) * estimate / t


def evaluations(sampler: str, times: Tensor, guidance: Guidance) -> int:
    """Generator evaluations (NFE) for one image along ``times``: two where guidance is active, one elsewhere.

    Raises:
        SettingError: as ``iris.diffusion.flow.integrate``.
    """
    return sum(2 if guidance.active(t) else 1 for t in evaluation_times(sampler, times))
