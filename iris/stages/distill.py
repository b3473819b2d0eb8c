"""Stage distill: a trained teacher's images in few steps."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iris.diffusion.sampling import SamplingSettings
from iris.errors import SettingError
from iris.io.pixels import to_pixels
from iris.model import TextToLatent, read_folder
from iris.pipeline import IrisPipeline
from iris.stages.base import Seen, shown
from iris.stages.data import check_stored
from iris.stages.flow import LatentStage
from iris.stages.vae import NamedLatent
from iris.training.distill_task import Distillation, DistillTask

TEACHER_STEPS = 16  # of the pictures that a student is held against


def students(weights: Path, steps: tuple[int, ...]) -> dict[int, Path]:
    """Folders of the students by their number of sampling steps; ``weights`` itself is that of most steps."""
    return {count: weights / f"steps-{count}" if count != max(steps) else weights for count in sorted(steps)}


class DistillStage(LatentStage):
    """Distil the teacher that ``earlier`` has; the latent, the text encoder and their size are its own."""

    def check(self) -> None:
        check_stored(self.settings.data, self.name)
        super().check()
        settings = self.settings
        if settings.student.method == "shortcut" and settings.train.batch < 2:
            raise SettingError(f"train.batch={settings.train.batch} must be at least 2 with student.method=shortcut")

    def facts(self) -> dict[str, Any]:
        # "sampling": what earlier versions saved does not say how it is sampled, and must not be taken as it is.
        return super().facts() | {"student": asdict(self.settings.student), "sampling": "saved"}

    def train(self, given: dict[str, Path]) -> dict[str, Any]:
        settings, parts = self.settings, read_folder(given["start"])
        if parts.size != self.size:
            teacher = f"from={settings.start}"
            raise SettingError(f"data.size={self.size} must be {parts.size}, as the teacher {teacher} has it")
        self.named = NamedLatent(*parts[1:4])
        encodings = self.encoded(self.named, parts.model.text)
        text = encodings.embedded or parts.model.text
        self.distillation = Distillation(TextToLatent(text, parts.model.generator), settings.student, settings.seed)
        # A frozen encoder's captions are those of the data; what is looked at must be among them.
        prompts = self._prompts(encodings.held_captions or encodings.captions)
        self.prompts = [prompts[i % len(prompts)] for i in range(settings.sample.count)]
        self.task = DistillTask(
            self.distillation,
            encodings.latents,
            text.tokenise(encodings.captions),
            text.tokenise([""])[0],
            settings.train.batch,
            settings.seed,
            settings.train.steps,
        )
        self._teachers: Tensor | None = None
        self.fit(self.task, self._look)
        if self.desk.processes.first:
            shutil.rmtree(self.weights, ignore_errors=True)
            for steps, folder in students(self.weights, settings.student.steps).items():
                self._pipeline(steps).save(folder)
        return {"metrics": {}, "example": shown(encodings.captions)}

    def usage(self, weights: Path, result: dict[str, Any]) -> list[str]:
        folders = students(weights, self.settings.student.steps).values()
        return [f'python -m iris --model {folder} "{result["example"]}"' for folder in folders]

    def _pipeline(self, steps: int) -> IrisPipeline:
        """The student for ``steps`` sampling steps."""
        chosen = self.settings.student
        model, sampling = self.distillation.few_step(steps), chosen.sampling(steps)
        return IrisPipeline(model, *self.named, self.size, sampling, chosen.guidance)

    def _teacher(self) -> IrisPipeline:
        """The teacher in as many steps as its pictures need, guided as the students are to be."""
        chosen = self.settings.student
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
        rows = [self._latents(self._pipeline(steps)) for steps in sorted(self.settings.student.steps)]
        value = (rows[0] - self._teachers).square().mean().item()
        if self.desk.processes.first:
            latent = self.named.latent.to(self._teachers.device)
            images = torch.cat([latent.decode(z) for z in [*rows, self._teachers]])
            self.picture(f"students-{step:06d}", to_pixels(images).cpu().numpy(), len(self.prompts))
        return value, {}

    def _latents(self, pipeline: IrisPipeline) -> Tensor:
        """Standardised latents of the prompts."""
        return pipeline(self.prompts, seed=self.settings.seed, output_type="latent").images
