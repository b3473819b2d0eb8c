"""The samplers and the guidance of ``iris.diffusion`` in NumPy; tests hold the two together.

Latents z and velocities are float32 [B, C, h, w], times float32 scalars, from 1 (noise) to 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from iris.errors import SettingError, require_choice

TOLERANCE = 1e-6  # of guidance's interval, as in iris.diffusion.guidance

Velocity = Callable[[np.ndarray, np.float32], np.ndarray]
Fresh = Callable[[], np.ndarray]  # unit noise of the step


def euler(velocity: Velocity, z: np.ndarray, t: np.float32, following: np.float32, fresh: Fresh) -> np.ndarray:
    """One evaluation."""
    return z + (following - t) * velocity(z, t)


def heun(velocity: Velocity, z: np.ndarray, t: np.float32, following: np.float32, fresh: Fresh) -> np.ndarray:
    """Two evaluations, one for the last step."""
    slope = velocity(z, t)
    ahead = z + (following - t) * slope
    return ahead if following == 0 else z + (following - t) * (slope + velocity(ahead, following)) / 2


def midpoint(velocity: Velocity, z: np.ndarray, t: np.float32, following: np.float32, fresh: Fresh) -> np.ndarray:
    """Two evaluations."""
    middle = (t + following) / 2
    return z + (following - t) * velocity(z + (middle - t) * velocity(z, t), middle)


def stochastic(velocity: Velocity, z: np.ndarray, t: np.float32, following: np.float32, fresh: Fresh) -> np.ndarray:
    """One evaluation; the estimate of the clean latent is noised anew."""
    estimate = z - t * velocity(z, t)
    return estimate if following == 0 else (1 - following) * estimate + following * fresh()


SAMPLERS = {"euler": euler, "heun": heun, "midpoint": midpoint, "stochastic": stochastic}


@dataclass(frozen=True)
class Sampling:
    """How images are made: the fields of ``iris.diffusion.sampling.SamplingSettings``, the defaults of ``IrisPipeline``.

    Raises:
        SettingError: an unknown sampler, or a number outside its range.
    """

    steps: int = 4
    sampler: str = "euler"
    guidance: float = 3.0
    shift: float = 1.0
    iterations: int | None = None
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        require_choice("sample.sampler", self.sampler, tuple(SAMPLERS))
        for name, fits, allowed in (
            ("steps", self.steps >= 1, "at least 1"),
            ("guidance", 0 <= self.guidance < math.inf, "finite and at least 0"),
            ("shift", 0 < self.shift < math.inf, "finite and above 0"),
            ("iterations", self.iterations is None or self.iterations >= 1, "at least 1, or null: as trained"),
            ("guidance_start", 0 <= self.guidance_start <= self.guidance_end, "at least 0 and at most guidance_end"),
            ("guidance_end", self.guidance_end <= 1, "at most 1"),
            ("guidance_rescale", 0 <= self.guidance_rescale <= 1, "from 0 to 1"),
        ):
            if not fits:
                raise SettingError(f"sample.{name}={getattr(self, name)} must be {allowed}")

    @property
    def guided(self) -> bool:
        """Whether the velocity without the text is needed at all."""
        return self.guidance != 1

    @property
    def evaluations(self) -> int:
        """Generator evaluations (NFE) for one image; a guided one counts twice. Found by following a constant."""
        times: list[np.float32] = []

        def velocity(z: np.ndarray, t: np.float32) -> np.ndarray:
            times.append(t)
            return z

        self.follow(velocity, np.zeros(1, np.float32), lambda step: np.zeros(1, np.float32))
        return sum(1 + self.active(t) for t in times)

    def times(self) -> np.ndarray:
        """float32 [steps + 1] from 1 to 0."""
        even = np.linspace(1, 0, self.steps + 1, dtype=np.float32)
        return (self.shift * even / (1 + (self.shift - 1) * even)).astype(np.float32)

    def follow(self, velocity: Velocity, z: np.ndarray, noise_at: Callable[[int], np.ndarray]) -> np.ndarray:
        """The latents that ``velocity`` leads the unit noise ``z`` to; ``noise_at`` gives a step's fresh noise."""
        for step, (t, following) in enumerate(itertools.pairwise(self.times())):
            z = SAMPLERS[self.sampler](velocity, z, t, following, lambda step=step: noise_at(step))
        return z

    def active(self, t: float) -> bool:
        """Whether guidance acts at time t."""
        return self.guided and self.guidance_start - TOLERANCE <= float(t) <= self.guidance_end + TOLERANCE

    def guide(self, conditional: np.ndarray, unconditional: np.ndarray, z: np.ndarray, t: np.float32) -> np.ndarray:
        """The guided velocity, its estimate of the clean latent rescaled; see ``iris.diffusion.guidance.Guidance``."""
        guided = unconditional + np.float32(self.guidance) * (conditional - unconditional)
        if self.guidance_rescale == 0 or t == 0:
            return guided
        axes, estimate = tuple(range(1, z.ndim)), z - t * guided
        factor = _deviation(z - t * conditional, axes) / _deviation(estimate, axes)
        return guided + np.float32(self.guidance_rescale) * (1 - factor) * estimate / t


def _deviation(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return x.std(axes, ddof=1, keepdims=True)
