"""The core's passes in a training step: how many, which of them are read out, and whether they continue a state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from iris.errors import SettingError
from iris.nn.condition import TextCondition
from iris.nn.generator import Evaluation, Generator, GeneratorConfig
from iris.randomness import addressed
from iris.training.loop import WHOLE, Share

RATE_STD = 0.5  # Huginn's sigma
LONGEST = 4  # times model.iterations: bounds a step's memory, and shortens 0.2% of the draws at 8 passes, 3% at 1
CARRY_SHARE = 0.5


class Passes(NamedTuple):
    """What a training step asks of the core: ``iterations`` (None: as configured), and the passes to read out after."""

    iterations: int | None = None
    exits: tuple[int, ...] = ()


def check_depth(config: GeneratorConfig, steps: int | None) -> None:
    """Whether ``config.depth`` can be trained for ``steps`` steps (None: not known).

    Raises:
        SettingError: depth.training=exits without the number of steps.
    """
    if config.depth.training == "exits" and steps is None:
        raise SettingError("depth.training=exits needs train.steps, over which the exits pass to distillation")


def log_normal_poisson(mean: float, count: int, draws: torch.Generator) -> Tensor:
    """``count`` numbers of passes (int64): r ~ Poisson(rate) + 1, rate ~ LogNormal(ln mean - s^2 / 2, s = 0.5).

    Huginn's distribution (arXiv 2502.05171): the rate's mean is ``mean``, so that of r is ``mean`` + 1.
    """
    normal = torch.randn(count, generator=draws, dtype=torch.float64)
    rate = torch.exp(math.log(mean) - RATE_STD**2 / 2 + RATE_STD * normal)
    return torch.poisson(rate, generator=draws).long() + 1


def passes_of(config: GeneratorConfig, seed: int, step: int) -> Passes:
    """The passes of training step ``step``, addressed by (seed, step).

    ``fixed``: as configured. ``drawn``: log-normal Poisson around model.iterations, at most four times as many.
    ``exits``: as configured, and an early read-out after 1 … model.iterations - 1 passes, all equally likely.
    """
    if config.depth.training == "drawn":
        drawn = log_normal_poisson(config.iterations, 1, addressed(seed, "iterations", step))
        return Passes(min(int(drawn), LONGEST * config.iterations))
    if config.depth.training == "exits":
        return Passes(None, (int(torch.randint(1, config.iterations, (), generator=addressed(seed, "exit", step))),))
    return Passes()


def evaluate(
    generator: Generator, z: Tensor, t: Tensor, text: TextCondition, seed: int, step: int, share: Share = WHOLE
) -> Evaluation:
    """The evaluation that step ``step`` learns from, as the generator's depth.* says; z, t and text are its ``share``.

    With depth.carry an addressed draw lets half of the steps start from the state that an evaluation of the same latent
    without gradient ended in, so that both beginnings met in sampling are trained: the first step's, and a later one's
    (RIN's latent self-conditioning, arXiv 2212.11972). The state is of the same time here; in sampling it comes from the
    time before.
    """
    depth, passes = generator.config.depth, passes_of(generator.config, seed, step)

    def once(carried: Tensor | None, exits: tuple[int, ...]) -> Evaluation:
        return generator.evaluate(
            z,
            t,
            text,
            passes.iterations,
            carried=carried,
            backprop=depth.backprop,
            exits=exits,
            draws=addressed(seed, "state", step),
            share=share,
        )

    carried = None
    if depth.carry and torch.rand((), generator=addressed(seed, "carry", step)) < CARRY_SHARE:
        with torch.no_grad():
            carried = once(None, ()).state
    return once(carried, passes.exits)


def depth_loss(
    evaluation: Evaluation, target: Tensor, error: Callable[[Tensor, Tensor], Tensor], step: int, steps: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of an evaluation against the true velocity ``target``, and what to log beside it.

    With an early read-out it is ELT's intra-loop self-distillation (arXiv 2604.09168): error(full, target)
    + share error(early, target) + (1 - share) error(early, full without gradient), share falling from 1 to 0.

    Args:
        error: of a predicted velocity and the one aimed at [B, C, h, w] -> scalar.
        step, steps: from 0, and how many in all.
    """
    full = error(evaluation.velocity, target)
    if not evaluation.early:
        return full, {}
    (early,) = evaluation.early
    share = truth_share(step, steps)
    taught, distilled = error(early, target), error(early, evaluation.velocity.detach())
    parts = {"loss_full": full, "loss_early": taught, "loss_distilled": distilled}
    return full + share * taught + (1 - share) * distilled, {name: part.detach() for name, part in parts.items()}


def truth_share(step: int, steps: int) -> float:
    """1 at the first of ``steps`` steps, 0 at the last, linear between."""
    return max(0.0, 1 - step / max(1, steps - 1))
