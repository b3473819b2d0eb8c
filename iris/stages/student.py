"""Stage distill: a trained teacher's images in few steps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iris.diffusion.sampling import SamplingSettings
from iris.errors import SettingError
from iris.io.pixels import to_pixels
from iris.model import TextToLatent, read_folder
from iris.pipeline import IrisPipeline
from iris.settings import facts
from iris.stages.flow import OnLatents, frozen_text_of
from iris.stages.latent import NamedLatent
from iris.stages.trained import Seen, shown
from iris.training.distill_task import Distillation, DistillTask

TEACHER_STEPS = 16  # of the pictures that a student is held against


def inside(steps: int, all_steps: tuple[int, ...]) -> str:
    """Where the student for ``steps`` lies within the weights, of which that for most steps is the top."""
    return "" if steps == max(all_steps) else f"steps-{steps}"


def students(weights: Path, steps: tuple[int, ...]) -> dict[int, Path]:
    """Folders of the students by their number of sampling steps."""
    return {one: weights / inside(one, steps) for one in sorted(steps)}


class StudentStage(OnLatents):
    """Distil the teacher that it starts from; the latent, the text encoder and their size are the teacher's own."""

    kind = "student"
    stage = "distill"

    @property
    def label(self) -> str:
        return f"student {self.recipe.student.method}"

    def frozen_text(self) -> tuple[Any, str] | None:
        return frozen_text_of(self.start)

    def check(self) -> None:
        recipe = self.recipe
        if self.live:
            raise SettingError(
                f"data.live=true: stage={self.stage} trains on what is stored; allowed: false (stages class, text and "
                "aesthetic may read live)"
            )
        if recipe.student.method == "shortcut" and self.training.batch < 2:
            raise SettingError(f"distill.batch={self.training.batch} must be at least 2 with student.method=shortcut")

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"student": facts(self.recipe.student)}

    def work(self) -> dict[str, Any]:
        recipe, parts = self.recipe, read_folder(self.start.place)
        if parts.size != self.size:
            raise SettingError(
                f"data.size={self.size} must be {parts.size}, as the teacher start={recipe.start} has it"
            )
        self.named = NamedLatent(*parts[1:4])
        given = self.material()
        text = given.embedded or parts.model.text
        self.distillation = Distillation(TextToLatent(text, parts.model.generator), recipe.student, recipe.seed)
        # A frozen encoder's captions are those of the data; what is looked at must be among them.
        self.shown = self.prompts(given.held_captions or given.captions)
        self.task = DistillTask(
            self.distillation,
            given.latents,
            text.tokenise(given.captions),
            text.tokenise([""])[0],
            self.training.batch,
            recipe.seed,
            self.training.steps,
        )
        self._teachers: Tensor | None = None
        self.fit(self.task, self._look)
        if self.context.processes.first:
            shutil.rmtree(self.place, ignore_errors=True)
            for steps, folder in students(self.place, recipe.student.steps).items():
                self._pipeline(steps).save(folder)
        return {"example": shown(given.captions)}

    def usage(self, weights: Path) -> list[str]:
        example = self.result["example"]
        return [
            f'python -m iris --model {folder} "{example}"'
            for folder in students(weights, self.recipe.student.steps).values()
        ]

    def _pipeline(self, steps: int) -> IrisPipeline:
        """The student for ``steps`` sampling steps."""
        chosen = self.recipe.student
        model, sampling = self.distillation.few_step(steps), chosen.sampling(steps)
        return IrisPipeline(model, *self.named, self.size, sampling, chosen.guidance)

    def _teacher(self) -> IrisPipeline:
        """The teacher in as many steps as its pictures need, guided as the students are to be."""
        chosen = self.recipe.student
        model = TextToLatent(self.distillation.student.text, self.distillation.teacher)
        sampling = SamplingSettings(
            TEACHER_STEPS,
            guidance=chosen.guidance,
            shift=chosen.shift,
            iterations=chosen.teacher_iterations,
            guidance_start=chosen.guidance_start,
            guidance_end=chosen.guidance_end,
        )
        return IrisPipeline(model, *self.named, self.size, sampling)

    @torch.no_grad()
    def _look(self, step: int) -> Seen:
        """Mean squared distance of the student's fewest-step samples from the teacher's, in standardised latents.

        Both start at the same noise. The picture has a row of samples for each number of steps.
        """
        if self._teachers is None:
            self._teachers = self._latents(self._teacher())
        rows = [self._latents(self._pipeline(steps)) for steps in sorted(self.recipe.student.steps)]
        value = (rows[0] - self._teachers).square().mean().item()
        if self.context.processes.first:
            latent = self.named.latent.to(self._teachers.device)
            images = torch.cat([latent.decode(z) for z in [*rows, self._teachers]])
            self.picture(f"students-{step:06d}", to_pixels(images).cpu().numpy(), len(self.shown))
        return value, {}

    def _latents(self, pipeline: IrisPipeline) -> Tensor:
        """Standardised latents of the prompts."""
        return pipeline(self.shown, seed=self.recipe.seed, output_type="latent").images
