"""A trial's settings -> its chain of stages, from the data to the scores; nothing is made yet.

data ─> latent ─> encoded ─┐                        ┌─> features ─> quality, duplicates
        captions ──────────┴─> flow ─> student ─┬─> images ─────────> alignment, skills
                                                └─> runtime form ─> speed, memory
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ablations.question.settings import TrialSettings
from eval.export import DTYPES
from eval.settings import IMAGES
from eval.stages.data import RealData, open_data
from eval.stages.evaluation import Evaluation
from eval.stages.export import Export
from eval.stages.judging import Judging
from eval.stages.makers import Maker
from eval.stages.possible import possible
from eval.stages.scores import SCORED, Score
from iris.data import WORLDS
from iris.diffusion.sampling import SamplingSettings
from iris.errors import SettingError
from iris.io.hashing import digest
from iris.settings import facts
from iris.stages.chain import model_stage
from iris.stages.engine import Context, Inside, Progress, Stage, Work
from iris.stages.flow import SAMPLING, OnLatents
from iris.stages.parts import model_facts, sampling_of
from iris.stages.processes import Processes
from iris.stages.settings import Recipe
from iris.stages.student import StudentStage, inside

USUAL = ("quality", "alignment", "skills")  # measures of a trial, as far as they are possible


@dataclass(frozen=True)
class Chain:
    """The stages of one trial.

    Attributes:
        model: the stage that the model comes from.
        weights: leaves that model, of several students the one, in a folder.
        sampling: how images are made, every value resolved.
        run: what the measures are taken on.
        scores: the measures.
        refused: measure -> why it cannot be taken.
    """

    settings: TrialSettings
    model: OnLatents
    weights: Work
    sampling: SamplingSettings
    run: Evaluation
    scores: list[Score]
    refused: dict[str, str]

    @cached_property
    def key(self) -> str:
        """12 hex digits of what determines the trial's result, and nothing of how it is run."""
        return digest([[score.key for score in self.scores], self.run.main.key])

    @cached_property
    def stages(self) -> list[Stage]:
        """All of them, the first first, each once."""
        found: dict[str, Stage] = {}
        for end in (self.run.main, *self.scores):
            for stage in end.chain():
                found.setdefault(stage.key, stage)
        return list(found.values())

    @property
    def network(self) -> str:
        """Names what one image takes: the network, how it is sampled and in what it runs, not how it was trained."""
        recipe, maker = self.settings, self.run.maker
        text = "labels" if self.model.by_class else recipe.model.text
        known = [model_facts(recipe, text), facts(recipe.latent), self.model.size]
        student = [facts(recipe.student)] if isinstance(self.model, StudentStage) else []
        return digest([*known, *student, vars(self.sampling), vars(recipe.runtime), maker.device])

    @property
    def flows(self) -> list[OnLatents]:
        """The stages that train the model, the first first."""
        return [stage for stage in self.model.chain() if isinstance(stage, OnLatents)]


class Chains:
    """Makes the chains of one command's trials; what several share is looked at once.

    Args:
        runs: the runs folder.
        progress: who is told.
        processes: how many share each batch of a trial; None: those that this process belongs to.
    """

    def __init__(self, runs: Path, progress: Progress, processes: int | None = None) -> None:
        self.runs, self.progress, self._processes = runs, progress, processes
        self._kept: dict[Any, Any] = {}

    def of(self, settings: TrialSettings) -> Chain:
        """The chain of one trial.

        Raises:
            SettingError: anything that would fail later and can be known now.
        """
        if settings.stage == "vae":
            raise SettingError("stage=vae makes no images; a trial's stage is one of class, text, aesthetic, distill")
        context = self._context(settings.compute.device)
        model = model_stage(Recipe(**{f.name: getattr(settings, f.name) for f in fields(Recipe)}), context)
        _check_captions(model, settings)
        work, sampling = sampled(model, settings)
        maker = self._maker(settings, model, work, sampling)
        judging = self._once("judge", settings.judge, lambda: Judging(settings.judge, context.processes.name))
        data = self._data(settings, model.size)
        run = Evaluation(context, settings.measure, maker, data, judging, settings.seed)
        asked = (settings.measure, settings.data, settings.judge)
        wanted, refused = self._once("measures", asked, lambda: possible(run, USUAL, IMAGES))
        return Chain(settings, model, work, sampling, run, [SCORED[name](run) for name in wanted], refused)

    def _context(self, device: str) -> Context:
        return self._once("context", device, lambda: Context(self.runs, self.progress, self._made(device)))

    def _made(self, device: str) -> Processes:
        return Processes(device, self._processes)

    def _data(self, settings: TrialSettings, size: int) -> RealData:
        split = settings.measure.split
        return self._once("data", (settings.data, split, size), lambda: open_data(settings.data, split, size))

    def _maker(self, settings: TrialSettings, model: OnLatents, work: Work, sampling: SamplingSettings) -> Maker:
        runtime, device, size = settings.runtime, model.context.processes.name, (model.size, model.size)
        dtype, batch = DTYPES[runtime.precision], settings.sample.batch
        if runtime.name == "pytorch":
            return Maker(work, "iris", vars(sampling), dtype, size, device, batch)
        exported = Export(model.context, work, runtime, batch or 1, sampling.iterations)
        resolved = vars(sampling) | {"iterations": sampling.iterations or settings.model.iterations}  # as the files say
        return Maker(exported, "exported", resolved, dtype, size, "cpu", batch)

    def _once(self, kind: str, settings: Any, make: Callable[[], Any]) -> Any:
        known = (kind, repr(settings))
        if known not in self._kept:
            self._kept[known] = make()
        return self._kept[known]


def sampled(model: OnLatents, settings: TrialSettings) -> tuple[Work, SamplingSettings]:
    """The model that makes a trial's images, and how: of several students that for sample.steps, or for most steps.

    Raises:
        SettingError: there is no such student; a value that cannot be used.
    """
    _check_passes(settings)
    if not isinstance(model, StudentStage):
        return model, sampling_of(settings, SAMPLING)
    steps = settings.sample.steps or max(settings.student.steps)
    if steps not in settings.student.steps:
        there = ", ".join(map(str, settings.student.steps))
        raise SettingError(f"sample.steps={steps}: student.steps={there} makes none for that; allowed: {there}")
    folder = inside(steps, settings.student.steps)
    chosen = sampling_of(settings, settings.student.sampling(steps))
    chosen.check_student(settings.student.guidance)
    return (Inside(model, folder) if folder else model), chosen


def _check_captions(model: OnLatents, settings: TrialSettings) -> None:
    """A trial is measured on its data's captions, and those of a drawn world name no class."""
    if settings.data.name in WORLDS and (model.by_class or settings.model.text == "labels"):
        named = f"stage={settings.stage}" if model.by_class else f"model.text={settings.model.text}"
        raise SettingError(
            f"{named}: its model knows classes, and data={settings.data.name} is measured on captions; allowed: stage=text "
            "with model.text=words, or data whose captions are class names, such as data=cifar10"
        )


def _check_passes(settings: TrialSettings) -> None:
    """Layers of their own run once each: there are no other numbers of passes to sample with."""
    passes, trained = settings.sample.iterations, settings.model.iterations
    if not settings.depth.share and passes not in (None, trained):
        raise SettingError(
            f"sample.iterations={passes} must be model.iterations={trained}, or null, with depth.share=false, whose layers "
            "run once each"
        )
