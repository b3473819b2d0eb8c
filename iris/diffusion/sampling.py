"""Sampling: how images are made, the generator as a guided velocity field that carries its state, noise to latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from iris.diffusion.editing import Picture
from iris.diffusion.flow import SAMPLERS, Velocity, integrate, time_grid
from iris.diffusion.guidance import Guidance, evaluations
from iris.errors import SettingError, require_choice
from iris.nn.condition import TextCondition
from iris.nn.generator import Generator
from iris.randomness import addressed, image_noise
from iris.settings import setting

# Unit noise of a shape [N, C, h, w] for the start (None) or for a step of the stochastic sampler.
Noise = Callable[[tuple[int, ...], int | None], Tensor]

# Called after a step with its number, the time it started at and the latents it came to; returns those to go on with.
StepHook = Callable[[int, Tensor, Tensor], Tensor]


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

    @classmethod
    def resolved(cls, defaults: SamplingSettings | None, **given: Any) -> SamplingSettings:
        """How images are made: as ``given``, else as ``defaults`` say, else in 4 Euler steps with guidance 3.

        Args:
            defaults: a model's own.
            given: fields; None leaves one to ``defaults``.

        Raises:
            SettingError: as the class.
        """
        given = {name: value for name, value in given.items() if value is not None}
        return replace(defaults or cls(4, guidance=3.0), **given)

    def check_student(self, distilled_guidance: float | None) -> None:
        """Raise a SettingError for guidance of a student, into whose weights ``distilled_guidance`` went (None: no student)."""
        if distilled_guidance is not None and self.guided:
            raise SettingError(
                f"sample.guidance={self.guidance}: this model is a student with guidance {distilled_guidance} distilled "
                "into its weights, and cannot be guided once more; allowed: 1"
            )

    @property
    def guided(self) -> bool:
        """Whether a null text is needed to lead away from."""
        return self.guidance != 1

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


def sample(
    generator: Generator,
    text: TextCondition,
    null: TextCondition | None,
    grid: tuple[int, int],
    settings: SamplingSettings,
    source: Noise,
    *,
    noise: Tensor | None = None,
    picture: Picture | None = None,
    after: StepHook | None = None,
) -> Tensor:
    """Standardised latents [N, C, h, w] of N encoded captions: noise, led by the guided velocity to the data.

    Args:
        text, null: conditions [N, ...]; null is what guidance leads away from.
        grid: (h, w).
        source: gives the noise to start from and that of each stochastic step.
        noise: unit noise [N, C, h, w] to start from instead.
        picture: to be changed; at strength 0 its latents are returned as they are.
        after: called after each step.

    Raises:
        SettingError: ``noise`` of another shape; guidance without ``null``.
    """
    weight = generator.input.weight
    shape = (len(text.tokens), generator.config.channels, *grid)

    def drawn(step: int | None) -> Tensor:
        return source(shape, step).to(weight.device, working_dtype(weight.dtype))

    if noise is not None and tuple(noise.shape) != shape:
        raise SettingError(f"latents must be {list(shape)}, got {list(noise.shape)}")
    z = drawn(None) if noise is None else noise.to(weight.device, working_dtype(weight.dtype))
    strength, keep = 1.0, None
    if picture is not None:
        z, strength, keep = picture.start(z), picture.strength, picture.keep(z)
    if strength == 0:
        return z
    times = time_grid(settings.steps, settings.shift, strength)

    def follow(step: int, t: Tensor, z: Tensor) -> Tensor:
        z = z if keep is None else keep(step, t, z)
        return z if after is None else after(step, times[step], z)

    velocity = GuidedVelocity(generator, text, null, settings.guide, settings.iterations)
    return integrate(velocity, z, times, settings.sampler, drawn, follow)


def invert(velocity: Velocity, clean: Tensor, settings: SamplingSettings, strength: float = 1.0) -> Tensor:
    """The latents at time ``strength`` that the flow would have led to ``clean`` [N, C, h, w].

    The steps of sampling in reverse order; going there and back again differs from ``clean`` by the sampler's error.

    Raises:
        SettingError: a sampler that draws noise cannot be reversed; strength outside (0, 1].
    """
    if settings.sampler == "stochastic":
        raise SettingError("sampler='stochastic' cannot be reversed; use euler, heun or midpoint")
    return integrate(velocity, clean, time_grid(settings.steps, settings.shift, strength).flip(0), settings.sampler)


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
