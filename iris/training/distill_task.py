"""Distillation as a task of the loop: a trained model taught to make its images in few steps."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iris.diffusion.distillation import (
    RowVelocity,
    consistency_target,
    guided,
    move,
    pseudo_huber,
    rising_grid,
    shortcut_target,
    solve,
)
from iris.diffusion.flow import TimeSampling, interpolate
from iris.errors import SettingError
from iris.model import TextToLatent, device_of
from iris.nn.condition import TextCondition
from iris.nn.generator import Generator
from iris.nn.student import fold, make_student, student_times
from iris.randomness import addressed
from iris.training.distill_settings import DistillSettings
from iris.training.loop import WHOLE, Share
from iris.training.safety import BatchFacts
from iris.training.tasks import batch_indices, keys_of


class Distillation(nn.Module):
    """Teacher, student, and the student's exponential moving average, the target network.

    All three are in its state, and so is the step up to which the target has followed: a checkpoint of this module
    holds what the next step depends on, teacher included. Only the student's generator is trained; the text encoder is
    the teacher's own and shared by all, so ``teacher`` no longer asks for gradients afterwards.

    Args:
        teacher: text encoder and generator, trained.
        settings: student.*.
        seed: draws the embeddings that the student has and the teacher has not.

    Raises:
        SettingError: passes that the teacher does not have.
    """

    def __init__(self, teacher: TextToLatent, settings: DistillSettings, seed: int) -> None:
        super().__init__()
        self.settings = settings
        settings.check_passes(teacher.generator.config)
        student = make_student(teacher.generator, settings.numbers, seed, settings.iterations)
        teacher.requires_grad_(False)
        self.student = TextToLatent(teacher.text, student)
        self.teacher = teacher.generator
        self.target = copy.deepcopy(self.student.generator).requires_grad_(False)
        self.register_buffer("followed", torch.tensor(-1))

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move the target towards the student, once a step however many shares the step has."""
        if step <= int(self.followed):
            return
        moving, leading = list(self.target.parameters()), list(self.student.generator.parameters())
        torch._foreach_lerp_(moving, leading, 1 - self.settings.ema)
        self.followed.fill_(step)

    def few_step(self, steps: int, guidance: float | None = None) -> TextToLatent:
        """The student for ``steps`` sampling steps, as a model that a pipeline takes, samples and saves like any other.

        Sample it as ``settings.sampling(steps)`` says, without guidance.

        Raises:
            SettingError: steps or a scale that the student was not trained for.
        """
        told = self.settings.told_throughout(steps, guidance)
        return TextToLatent(self.student.text, fold(self.student.generator, told))


@dataclass
class Batch:
    """Rows of a step: clean latents and noise [B, C, h, w], conditions, the guidance scale [B] folded in."""

    module: Distillation
    clean: Tensor
    noise: Tensor
    text: TextCondition
    null: TextCondition | None
    scale: Tensor

    @property
    def teacher(self) -> RowVelocity:
        """The teacher's velocity of these rows, guided."""
        settings = self.module.settings
        interval = (settings.guidance_start, settings.guidance_end)
        return guided(self.module.teacher, self.text, self.null, self.scale, interval, settings.teacher_iterations)

    def only(self, kept: Tensor) -> Batch:
        """Those of the rows for which ``kept`` [B] is true."""
        text, null = (
            None if whole is None else TextCondition(*(value[kept] for value in whole))
            for whole in (self.text, self.null)
        )
        return Batch(self.module, self.clean[kept], self.noise[kept], text, null, self.scale[kept])


@dataclass
class DistillTask:
    """Distil on standardised latents [N, C, h, w] and captions as token numbers [N, L]; ``null`` [L] is the empty one.

    Each step draws its rows, noise, times, levels and guidance scales at its address, for the whole batch. ``steps`` is
    how many steps the run has, which student.grid_end needs.

    Raises:
        SettingError: student.grid_end without ``steps``; a batch of one row, which student.bootstrap cannot divide.
    """

    module: Distillation
    latents: Tensor
    captions: Tensor
    null: Tensor
    batch: int
    seed: int
    steps: int | None = None

    def __post_init__(self) -> None:
        settings = self.module.settings
        if settings.grid_end is not None and self.steps is None:
            raise SettingError("student.grid_end needs distill.steps, over which the grid changes")
        if settings.method == "shortcut" and self.batch < 2:
            raise SettingError(f"distill.batch={self.batch} must be at least 2 with student.method=shortcut")

    def rows(self, step: int) -> Tensor:
        """Which latents and captions step ``step`` takes."""
        return batch_indices(len(self.latents), self.batch, self.seed, step)

    def loss(self, step: int, share: Share = WHOLE) -> tuple[Tensor, dict[str, Tensor]]:
        self.module.follow(step)
        batch = self._batch(step, share)
        objective = self._consistency if self.module.settings.method == "consistency" else self._shortcut
        return objective(step, share, batch)

    def describe(self, step: int) -> BatchFacts:
        """What a message about step ``step`` names."""
        settings = {f"student.{name}": getattr(self.module.settings, name) for name in ("method", "guidance", "delta")}
        rows = self.rows(step).tolist()
        return BatchFacts(rows, tuple(self.latents.shape[1:]), settings, keys_of(self.latents, rows))

    def _consistency(self, step: int, share: Share, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """f(z_t, t) towards f at the latent that the teacher makes of z_t one interval of the grid later."""
        settings = self.module.settings
        count = settings.grid_at(step, self.steps)
        grid = rising_grid(count, settings.shift)
        above = share.take(self._positions(step, torch.tensor(count))) + 1
        length = count // settings.segments
        t, to, end = (grid[i].to(batch.clean) for i in (above, above - 1, (above - 1) // length * length))
        z = interpolate(batch.clean, batch.noise, t)
        with torch.no_grad():
            ahead = solve(batch.teacher, z, t, to, settings.solver, settings.solver_steps)
            target = consistency_target(lambda z, t: self._target(z, t, batch), ahead, to, end)
        predicted = move(z, self._student(z, t, batch), t, end)
        extras = {"mse": (predicted - target).detach().square().mean(), "grid": predicted.new_tensor(float(count))}
        return pseudo_huber(predicted, target, settings.delta), extras

    def _shortcut(self, step: int, share: Share, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean velocity of a step: the teacher's over an interval of the grid, or that of two half steps."""
        settings = self.module.settings
        own = min(max(1, round(self.batch * settings.bootstrap)), self.batch - 1)
        level = torch.full((self.batch,), settings.levels)
        level[:own] = torch.randint(settings.levels, (own,), generator=addressed(self.seed, "level", step))
        t = (self._positions(step, 2**level) + 1) / 2.0**level
        level, t = (share.take(x).to(batch.clean) for x in (level, t))
        z = interpolate(batch.clean, batch.noise, t)
        learns = share.take(torch.arange(self.batch)).to(z.device) < own
        with torch.no_grad():
            target = torch.empty_like(z)
            if learns.any():
                mine = batch.only(learns)
                target[learns] = shortcut_target(
                    lambda z, t, level: self._target(z, t, mine, level), z[learns], t[learns], level[learns]
                )
            if not learns.all():
                start, size = z[~learns], 1 / settings.grid
                end = solve(
                    batch.only(~learns).teacher,
                    start,
                    t[~learns],
                    t[~learns] - size,
                    settings.solver,
                    settings.solver_steps,
                )
                target[~learns] = (start - end) / size
        error = (self._student(z, t, batch, level) - target).square().flatten(1).mean(1)
        whole = share.of * error.detach()  # the mean of this over the shares is a sum over the batch's rows
        extras = {"loss_own": whole[learns].sum() / own, "loss_teacher": whole[~learns].sum() / (self.batch - own)}
        return error.mean(), extras

    def _batch(self, step: int, share: Share) -> Batch:
        """The rows of the step's batch that ``share`` names; everything is drawn for the whole batch."""
        settings, place, chosen = self.module.settings, device_of(self.module), share.take(self.rows(step))
        noise = torch.randn((self.batch, *self.latents.shape[1:]), generator=addressed(self.seed, "noise", step))
        scale = torch.full((self.batch,), float(settings.guidance))
        if settings.guidance_max is not None:
            uniform = torch.rand(self.batch, generator=addressed(self.seed, "guidance", step))
            scale = torch.lerp(scale, torch.full_like(scale, settings.guidance_max), uniform)
        clean, captions = self.latents[chosen].to(place), self.captions[chosen].to(place)
        with torch.no_grad():
            text = self.module.student.text(captions)
            null = None
            if settings.guidance != 1 or settings.guidance_max is not None:
                null = self.module.student.text(self.null[None].to(place))
                null = TextCondition(*(value.expand(len(clean), *value.shape[1:]) for value in null))
        return Batch(self.module, clean, share.take(noise).to(clean), text, null, share.take(scale).to(place))

    def _positions(self, step: int, counts: Tensor) -> Tensor:
        """For each row of the batch a whole number from 0 to ``counts`` - 1 (int64 [B]), stratified over the batch."""
        uniform = TimeSampling("uniform").draw(self.batch, addressed(self.seed, "time", step))
        return torch.minimum((uniform * counts).long(), counts - 1)

    def _student(self, z: Tensor, t: Tensor, batch: Batch, level: Tensor | None = None) -> Tensor:
        return self._velocity(self.module.student.generator, z, t, batch, level)

    def _target(self, z: Tensor, t: Tensor, batch: Batch, level: Tensor | None = None) -> Tensor:
        return self._velocity(self.module.target, z, t, batch, level)

    def _velocity(self, network: Generator, z: Tensor, t: Tensor, batch: Batch, level: Tensor | None) -> Tensor:
        times = student_times(t, self.module.settings.told(level, batch.scale))
        return network.evaluate(z, times, batch.text, backprop=network.config.depth.backprop).velocity.to(z.dtype)
