"""The generator: a prelude of convolutions, a core looped with shared weights, a coda of local attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iris.errors import SettingError
from iris.nn.blocks import INJECTIONS, CodaBlock, ConvBlock, CoreLayer
from iris.nn.condition import TextCondition
from iris.nn.constants import cached_constant
from iris.nn.depth import Depth
from iris.nn.layers import (
    Linear,
    Modulation,
    RMSNorm,
    ScalarEmbedding,
    ZeroLinear,
    modulate,
    position_embedding,
    rms_normalise,
)
from iris.nn.mixers import MixerOptions, build_mixer, check_mixer
from iris.randomness import addressed

INITIAL_STD = math.sqrt(2 / 5)  # of depth.initial=noise, as Huginn's "like-init" (arXiv 2502.05171)


@dataclass(frozen=True)
class GeneratorConfig:
    """What determines a generator's shape. ``mixer_width`` is the mixer's inner width (None: ``dim``).

    Raises:
        SettingError: a size below one, a ``dim`` that heads do not divide, an unknown mixer. A ``mixer_width`` that the
            mixer cannot have is told when the generator is made.
    """

    channels: int
    text_width: int
    dim: int
    heads: int
    prelude: int
    core: int
    coda: int
    iterations: int
    ffn_ratio: float
    mixer: str
    mixer_width: int | None = None
    mixers: MixerOptions = field(default_factory=MixerOptions)
    depth: Depth = field(default_factory=Depth)

    def __post_init__(self) -> None:
        for name in ("channels", "text_width", "dim", "heads", "prelude", "core", "coda", "iterations"):
            if getattr(self, name) < 1:
                raise SettingError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.dim % (4 * self.heads):
            raise SettingError(f"model.dim={self.dim} must be a multiple of 4 * model.heads={4 * self.heads}")
        if not self.ffn_ratio * self.dim >= 1:
            raise SettingError(
                f"model.ffn_ratio={self.ffn_ratio} must give at least one hidden channel of model.dim={self.dim}"
            )
        check_mixer(self.mixer)
        if self.depth.training == "exits" and self.iterations < 2:
            raise SettingError(f"depth.training=exits needs model.iterations >= 2, got {self.iterations}")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GeneratorConfig:
        """What ``to_dict`` gave; groups that are absent keep their defaults."""
        groups = {"mixers": MixerOptions.from_dict(values.get("mixers", {})), "depth": Depth(**values.get("depth", {}))}
        return cls(**(values | groups))


class Evaluation(NamedTuple):
    """What one evaluation gives: the velocity [B, C, h, w], velocities read out early, the core's last state [B, h, w, D]."""

    velocity: Tensor
    early: tuple[Tensor, ...]
    state: Tensor


class Generator(nn.Module):
    """Predicts the flow's velocity: z_t [B, C, h, w], t [B] and text -> v [B, C, h, w], for any h x w.

    The core is passed ``iterations`` times with the same weights; its modulation also sees how far the loop is, as a
    fraction, which stays in range for a number of passes unseen in training. Text keys and values are made once for all
    passes. With ``depth.share`` false each pass has layers of its own.

    With ``checkpoint_passes`` a pass keeps its state alone for the backward, which computes the rest again: memory
    grows by one state a pass, a step takes about a third longer.
    """

    checkpoint_passes = False

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        dim, depth = config.dim, config.depth
        self.input = Linear(config.channels, dim)
        self.time = ScalarEmbedding(dim)
        self.iteration = ScalarEmbedding(dim) if depth.conditioning != "time" else None
        self.projection = ZeroLinear(dim, 9 * dim) if depth.conditioning == "single" else None
        self.text_norm, self.text_pooled = RMSNorm(config.text_width), Linear(config.text_width, dim)
        self.prelude = nn.ModuleList(
            ConvBlock(dim, config.ffn_ratio, depth.conditioning) for _ in range(config.prelude)
        )
        self.injection = INJECTIONS[depth.injection](dim)
        self.carried = ZeroLinear(dim, dim) if depth.carry else None
        self.core = nn.ModuleList(
            CoreLayer(
                build_mixer(config.mixer, dim, config.mixer_width, config.heads, config.mixers),
                dim,
                config.text_width,
                config.heads,
                config.ffn_ratio,
                depth.conditioning,
                depth.norm,
            )
            for _ in range(config.core * (1 if depth.share else config.iterations))
        )
        self.coda = nn.ModuleList(
            CodaBlock(dim, config.heads, config.ffn_ratio, depth.conditioning) for _ in range(config.coda)
        )
        self.final_modulation = Modulation(dim, 2)
        self.output = ZeroLinear(dim, config.channels)

    def forward(self, z: Tensor, t: Tensor, text: TextCondition, iterations: int | None = None) -> Tensor:
        """Velocity [B, C, h, w] after ``iterations`` passes through the core (None: as configured).

        Raises:
            SettingError: iterations < 1, or a latent or text of another width than the generator was made for.
        """
        return self.evaluate(z, t, text, iterations).velocity

    def evaluate(
        self,
        z: Tensor,
        t: Tensor,
        text: TextCondition,
        iterations: int | None = None,
        *,
        carried: Tensor | None = None,
        backprop: int | None = None,
        exits: Sequence[int] = (),
        draws: torch.Generator | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> Evaluation:
        """Like ``forward``, with what training and sampling with a carried state need.

        Args:
            z, t, text, iterations: latents [B, C, h, w], times [B], the text, passes through the core.
            carried: the ``state`` of the evaluation before, for depth.carry (None: start anew).
            backprop: gradient flows through the last so many passes (None: all).
            exits: passes after which the velocity is also read out.
            draws: gives the noise of depth.initial=noise; None: one fixed map, the same for every image.
            share: (index, of): z is the rows index::of of a batch, for all of which ``draws`` gives noise.

        Raises:
            SettingError: as ``forward``; an exit outside the loop; a carried state that the generator has no use for.
        """
        iterations = self._check(z, text, iterations, carried, exits)
        text = TextCondition(
            text.tokens.to(self.input.weight.dtype), text.mask, text.pooled.to(self.input.weight.dtype)
        )
        condition = self.time(t) + self.text_pooled(rms_normalise(text.pooled))
        signal = self._signal(condition)
        x = self.input(z.permute(0, 2, 3, 1))
        x = x + position_embedding(x.shape[1], x.shape[2], x.shape[3], x.device, x.dtype)
        for block in self.prelude:
            x = block(x, signal)
        state = self._initial(x, draws, share)
        if carried is not None:
            state = state + self.carried(rms_normalise(carried))
        state, left = self.loop(state, x, condition, text, iterations, backprop, exits)
        return Evaluation(
            self._read(state, condition, signal), tuple(self._read(s, condition, signal) for s in left), state
        )

    def loop(
        self,
        state: Tensor,
        given: Tensor,
        condition: Tensor,
        text: TextCondition,
        iterations: int,
        backprop: int | None = None,
        exits: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """The core passed ``iterations`` times: the last state, and those after the passes in ``exits``."""
        tokens = self.text_norm(text.tokens)
        prepared = [layer.cross.prepare(tokens) for layer in self.core]
        signals = self._pass_signals(condition, iterations)
        left: dict[int, Tensor] = {}
        for k in range(iterations):
            without = backprop is not None and k < iterations - backprop
            with torch.no_grad() if without else nullcontext():
                given_to_pass = (k, state, given, signals[k], prepared, text.mask)
                if self.checkpoint_passes and torch.is_grad_enabled():
                    state = checkpoint(self._pass, *given_to_pass, use_reentrant=False)
                else:
                    state = self._pass(*given_to_pass)
            if k + 1 in exits:  # what is not read out is not kept: memory must not grow with the passes
                left[k + 1] = state
        return state, [left[k] for k in exits]

    def _pass(
        self, k: int, state: Tensor, given: Tensor, signal: Tensor, prepared: list[tuple[Tensor, Tensor]], mask: Tensor
    ) -> Tensor:
        """Pass ``k`` (from 0) through the core."""
        state = self.injection(state, given)
        first = 0 if self.config.depth.share else k * self.config.core
        for i in range(first, first + self.config.core):
            state = self.core[i](state, signal, prepared[i], mask)
        return state

    def _pass_signals(self, condition: Tensor, iterations: int) -> list[Tensor]:
        """What the core's modulation reads at each pass."""
        if self.iteration is None:
            return [condition] * iterations
        # An early exit must see what a loop that ends there would see: then progress counts in trained passes.
        whole = max(iterations, self.config.iterations) if self.config.depth.training == "exits" else iterations
        progress = torch.arange(1, iterations + 1, device=condition.device) / whole
        embedded = self.iteration(progress).to(condition.dtype)
        return [self._signal(condition + embedded[k]) for k in range(iterations)]

    def _signal(self, condition: Tensor) -> Tensor:
        return condition if self.projection is None else self.projection(F.silu(condition))

    def _initial(self, given: Tensor, draws: torch.Generator | None, share: tuple[int, int] = (0, 1)) -> Tensor:
        kind = self.config.depth.initial
        if kind == "input":
            return given
        if kind == "zero":
            return torch.zeros_like(given)
        index, of = share if draws is not None else (0, 1)
        shape = (1 if draws is None else len(given) * of, *given.shape[1:])
        noise = _fixed_noise(*shape) if draws is None else torch.randn(shape, generator=draws)
        return (noise[index::of] * INITIAL_STD).to(given).expand_as(given)

    def _read(self, state: Tensor, condition: Tensor, signal: Tensor) -> Tensor:
        """Coda and output: a core state [B, h, w, D] -> velocity [B, C, h, w]."""
        for block in self.coda:
            state = block(state, signal)
        shift, scale = self.final_modulation(condition)
        return self.output(modulate(rms_normalise(state), shift, scale)).permute(0, 3, 1, 2)

    def _check(
        self, z: Tensor, text: TextCondition, iterations: int | None, carried: Tensor | None, exits: Sequence[int]
    ) -> int:
        config = self.config
        iterations = config.iterations if iterations is None else iterations
        if iterations < 1:
            raise SettingError(f"iterations={iterations} must be at least 1")
        if not config.depth.share and iterations != config.iterations:
            raise SettingError(
                f"iterations={iterations} must be model.iterations={config.iterations} with depth.share=false"
            )
        if z.dim() != 4 or z.shape[1] != config.channels:
            raise SettingError(f"latent must be [B, {config.channels}, h, w], got {tuple(z.shape)}")
        if text.tokens.shape[-1] != config.text_width:
            raise SettingError(f"text tokens must be {config.text_width} wide, got {text.tokens.shape[-1]}")
        if any(not 1 <= k <= iterations for k in exits):
            raise SettingError(f"exits={list(exits)} must lie in 1 … iterations={iterations}")
        if carried is not None and self.carried is None:
            raise SettingError("a carried state needs depth.carry=true")
        return iterations


@cached_constant
def _fixed_noise(*shape: int) -> Tensor:
    """Unit noise that is the same for every image, a constant of the graph when the generator is exported."""
    return torch.randn(shape, generator=addressed("initial state", *shape))
