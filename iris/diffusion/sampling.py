"""Sampling: how images are made, and the generator as a guided velocity field that carries its state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iris.diffusion.flow import SAMPLERS, time_grid
from iris.diffusion.guidance import Guidance, evaluations
from iris.errors import SettingError, require_choice
from iris.nn.condition import TextCondition
from iris.nn.generator import Generator
from iris.randomness import addressed, image_noise
from iris.settings import setting

# Unit noise of a shape [N, C, h, w] for the start (None) or for a step of the stochastic sampler.
Noise = Callable[[tuple[int, ...], int | None], Tensor]


@dataclass(frozen=True)
class SamplingSettings:
    """How images are made. ``guidance`` 1 means none; ``iterations`` None means as trained.

    ``guidance_start``, ``guidance_end`` and ``guidance_rescale`` are those of ``iris.diffusion.guidance.Guidance``.

    Raises:
        SettingError: an unknown sampler, or a number outside its range.
    """

    steps: int
    sampler: str = "euler"
    guidance: float = 1.0
    shift: float = 1.0
    iterations: int | None = None
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        require_choice("sample.sampler", self.sampler, tuple(SAMPLERS))
        if self.iterations is not None and self.iterations < 1:
            raise SettingError(f"sample.iterations={self.iterations} must be at least 1, or null: as trained")
        time_grid(self.steps, self.shift)
        self.guide  # noqa: B018 (checks the numbers of guidance)

    @property
    def guide(self) -> Guidance:
        """The guidance that these settings describe."""
        return Guidance(self.guidance, self.guidance_start, self.guidance_end, self.guidance_rescale)

    @property
    def evaluations(self) -> int:
        """Generator evaluations (NFE) for one image; a guided one counts twice."""
        return evaluations(self.sampler, time_grid(self.steps, self.shift), self.guide)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Settings sample.*: how images are made; null leaves a value to the model, or to the pipeline's own call."""

    steps: int | None = setting(None, "of the flow", low=1)
    sampler: str | None = setting(None, "euler, heun, midpoint, stochastic")
    guidance: float | None = setting(None, "1: none", low=0)
    guidance_start: float | None = setting(None, "guidance acts at times from here", low=0, high=1)
    guidance_end: float | None = setting(None, "to here", low=0, high=1)
    guidance_rescale: float | None = setting(None, "how far contrast is brought back", low=0, high=1)
    shift: float | None = setting(None, "of the times", low=0, above=True)
    iterations: int | None = setting(None, "passes through the core; null: as trained", low=1)
    height: int | None = setting(None, "of a diffusers pipeline, pixels", low=8)
    width: int | None = setting(None, "of a diffusers pipeline, pixels", low=8)
    batch: int | None = setting(None, "images at once; null: what a processor's memory takes", low=1, result=False)

    def given(self, kind: str, known: Sequence[str]) -> dict[str, Any]:
        """What is set, ``batch`` apart.

        Raises:
            SettingError: one of it means nothing for this kind of model.
        """
        values = {name: value for name, value in vars(self).items() if value is not None and name != "batch"}
        for name in values:
            if name not in known:
                allowed = ", ".join(f"sample.{one}" for one in known) or "none"
                raise SettingError(f"sample.{name} means nothing for kind={kind}; its settings: {allowed}")
        return values


class GuidedVelocity:
    """The velocity of latents z [B, C, h, w] at a time t (a scalar) under a text: what ``iris.diffusion.flow.integrate`` follows.

    Both halves of guidance are one batch. With ``depth.carry`` each evaluation starts from the state of the one before;
    where guidance sets in midway, the unconditional half starts from the conditional one's. z keeps its precision; the
    generator computes in its own.

    Args:
        generator: the network.
        text: the condition of each image, [B, ...].
        null: what guidance leads away from, [B, ...]; needed unless its scale is 1.
        guidance: its scale and interval.
        iterations: passes through the core (None: as configured).

    Raises:
        SettingError: guidance without ``null``.
    """

    def __init__(
        self,
        generator: Generator,
        text: TextCondition,
        null: TextCondition | None = None,
        guidance: Guidance = Guidance(),
        iterations: int | None = None,
    ) -> None:
        if null is None and guidance.scale != 1:
            raise SettingError(f"guidance_scale={guidance.scale} needs a null text to lead away from")
        self.generator, self.guidance, self.iterations = generator, guidance, iterations
        self.text = self.both = text
        if null is not None:
            self.both = TextCondition(*(torch.cat(halves) for halves in zip(text, null, strict=True)))
        self._state: Tensor | None = None

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        return self.guidance.velocity(self._evaluate, z, t)

    def _evaluate(self, z: Tensor, t: Tensor, both: bool) -> Tensor:
        weight = self.generator.input.weight
        given = (torch.cat([z, z]) if both else z).to(weight.dtype)
        times, text = t.to(weight.device).expand(len(given)), self.both if both else self.text
        if not self.generator.config.depth.carry:
            return self.generator(given, times, text, self.iterations).to(z.dtype)
        evaluation = self.generator.evaluate(given, times, text, self.iterations, carried=self._carried(len(given)))
        self._state = evaluation.state
        return evaluation.velocity.to(z.dtype)

    def _carried(self, count: int) -> Tensor | None:
        """The last state for a batch of ``count``: the conditional half comes first."""
        state = self._state
        if state is None or len(state) == count:
            return state
        return state[:count] if len(state) > count else torch.cat([state, state])


def addressed_noise(seed: int, first: int = 0) -> Noise:
    """Noise whose row i depends on (seed, first + i) and the step alone, whatever the batch size."""

    def noise(shape: tuple[int, ...], step: int | None) -> Tensor:
        if step is None:
            return image_noise(seed, first, shape[0], shape[1:])
        rows = range(first, first + shape[0])
        return torch.stack([torch.randn(shape[1:], generator=addressed(seed, "sample", row, step)) for row in rows])

    return noise


def drawn_noise(source: torch.Generator) -> Noise:
    """Noise drawn from ``source``, on its device, as diffusers does."""
    return lambda shape, step: torch.randn(shape, generator=source, device=source.device)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which latents are integrated: at least float32, or small steps would be lost in rounding."""
    return torch.promote_types(dtype, torch.float32)
