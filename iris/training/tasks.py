"""The text-conditioned flow as a task of the loop, and what tasks share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from iris.diffusion.flow import TimeSampling, check_weight, interpolate, velocity_loss, weighted_error
from iris.model import TextToLatent, device_of
from iris.randomness import addressed
from iris.training.depth import check_depth, depth_loss, evaluate
from iris.training.loop import WHOLE, Share
from iris.training.safety import BatchFacts


def batch_indices(count: int, batch: int, seed: int, step: int) -> Tensor:
    """Which ``batch`` of ``count`` examples step ``step`` uses: epochs of one permutation each, addressed by (seed, epoch)."""
    positions = torch.arange(step * batch, (step + 1) * batch)
    parts = []
    for epoch in range(int(positions[0]) // count, int(positions[-1]) // count + 1):
        parts.append(_order(count, seed, epoch)[positions[positions // count == epoch] % count])
    return torch.cat(parts)


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    """An epoch's permutation, kept while it lasts: of a million rows it takes 10 ms."""
    return torch.randperm(count, generator=addressed(seed, "order", epoch))


def keys_of(data: object, rows: list[int]) -> list[str]:
    """Where rows came from; of data that do not say so, nothing."""
    return data.keys(rows) if hasattr(data, "keys") else []


@dataclass
class FlowTask:
    """Train the flow on standardised latents [N, C, h, w] and captions as token numbers [N, L].

    With probability ``caption_dropout`` a caption is replaced by ``null`` [L], so that guidance has its unconditional half.
    The passes through the core are those of the generator's depth.* (``iris.training.depth``). ``steps`` is how many
    steps the run has, which depth.training=exits needs.

    Raises:
        SettingError: an unknown loss weight, or depth.* cannot be trained so.
    """

    module: TextToLatent
    latents: Tensor
    captions: Tensor
    null: Tensor
    batch: int
    seed: int
    caption_dropout: float
    loss_weight: str
    times: TimeSampling = TimeSampling()
    min_snr_gamma: float = 5.0
    steps: int | None = None

    def __post_init__(self) -> None:
        check_weight(self.loss_weight, self.min_snr_gamma)
        check_depth(self.module.generator.config, self.steps)

    def rows(self, step: int) -> Tensor:
        """Which latents and captions step ``step`` takes."""
        return batch_indices(len(self.latents), self.batch, self.seed, step)

    def examples(self, step: int, share: Share) -> tuple[Tensor, Tensor]:
        """The latents and the captions that ``share`` of step ``step`` takes."""
        chosen = share.take(self.rows(step))
        return self.latents[chosen], self.captions[chosen]

    def loss(self, step: int, share: Share = WHOLE) -> tuple[Tensor, dict[str, Tensor]]:
        place, (clean, captions) = device_of(self.module), self.examples(step, share)
        clean = clean.to(place)
        dropped = torch.rand(self.batch, generator=addressed(self.seed, "dropout", step)) < self.caption_dropout
        captions = torch.where(share.take(dropped)[:, None], self.null, captions).to(place)
        t = share.take(self.times.draw(self.batch, addressed(self.seed, "time", step))).to(place)
        shape = (self.batch, *clean.shape[1:])
        noise = share.take(torch.randn(shape, generator=addressed(self.seed, "noise", step))).to(place)
        text = self.module.text(captions)
        z = interpolate(clean, noise, t)
        evaluation = evaluate(self.module.generator, z, t, text, self.seed, step, share)

        def error(predicted: Tensor, target: Tensor) -> Tensor:
            return weighted_error(predicted, target, t, self.loss_weight, self.min_snr_gamma)

        return depth_loss(evaluation, noise - clean, error, step, self.steps)

    def describe(self, step: int) -> BatchFacts:
        """What a message about step ``step`` names."""
        settings = {
            "loss_weight": self.loss_weight,
            "time": self.times.kind,
            "model.iterations": self.module.generator.config.iterations,
        }
        rows = self.rows(step).tolist()
        return BatchFacts(rows, tuple(self.latents.shape[1:]), settings, keys_of(self.latents, rows))


@torch.no_grad()
def validation_loss(task: FlowTask, batches: int = 8) -> float:
    """Mean unweighted velocity loss of ``task``'s module over the first batches of the data it holds, without dropout.

    Times and noise are addressed apart from training's, and are the same for every trial with the task's seed.
    """
    total, count, place = 0.0, 0, device_of(task.module)
    for step in range(min(batches, max(1, len(task.latents) // task.batch))):
        part = slice(step * task.batch, (step + 1) * task.batch)
        clean = task.latents[part].to(place)
        t = TimeSampling().draw(len(clean), addressed(task.seed, "validation time", step)).to(place)
        noise = torch.randn(clean.shape, generator=addressed(task.seed, "validation noise", step)).to(place)
        predicted = task.module(interpolate(clean, noise, t), t, task.captions[part].to(place))
        total += velocity_loss(predicted, clean, noise, t).item() * len(clean)
        count += len(clean)
    return total / count
