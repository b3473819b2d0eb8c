"""Stages class, text and aesthetic: the flow, conditioned on classes or captions, from nothing or from weights."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from iris.data import SourceSettings
from iris.data.table import Table
from iris.diffusion.sampling import SamplingSettings
from iris.errors import SettingError
from iris.model import CONFIG, TextToLatent, read_folder
from iris.nn.generator import Generator
from iris.nn.mixers import check_mixer
from iris.pipeline import IrisPipeline
from iris.randomness import initialise
from iris.settings import facts
from iris.stages.data import (
    caption_of,
    class_namer,
    class_names,
    fingerprint,
    held_out,
    opened,
    rows_of,
    size_of,
    streamed,
    with_classes,
)
from iris.stages.encoded import Captions, Encoded, Latents
from iris.stages.engine import Context, Finished, Work
from iris.stages.latent import NamedLatent, load_latent
from iris.stages.latent_cache import CachedLatents
from iris.stages.parts import (
    check_size,
    generator_config,
    latent_sizes,
    model_facts,
    parameters_of,
    sampling_of,
    text_fingerprint,
    text_of,
)
from iris.stages.settings import Recipe
from iris.stages.trained import Seen, Trained, shown
from iris.text import TextEncoder
from iris.training.live import LiveBatches, LiveFlowTask
from iris.training.tasks import FlowTask, validation_loss

FIRST = 512  # rows that are looked at where none are held out of live data
SAMPLING = SamplingSettings(steps=6, guidance=2.5)  # of a flow that was trained here, where sample.* does not say


class Material(NamedTuple):
    """What the flow is trained on: latents, what each is of, and the encoder for that, if it is a frozen one.

    With data.live there are no latents, and the captions are those that are known beforehand: all of a table, those of the
    first rows of a stream.
    """

    latents: Latents | None
    captions: list[str]
    held: Latents | None
    held_captions: list[str]
    embedded: TextEncoder | None


class OnLatents(Trained):
    """What the flow's stages and distillation share: a data set as latents and captions, on disk or live.

    Args:
        latent: a stage vae, or weights that hold a latent.
        start: what it goes on from, if anything.
    """

    def __init__(self, context: Context, recipe: Recipe, latent: Work, start: Work | None = None) -> None:
        self.start, self.recipe, self.context = start, recipe, context
        self._choose_rows()
        store, live = recipe.latent.store, recipe.data.live
        self.train_rows = None if live else Encoded(context, self.source, latent, store)
        self.held_rows = None if self.held is None else Encoded(context, self.held, latent, store)
        needs = {"latent": latent, "start": start, "encoded": self.train_rows}
        self.captions_made = None if live else self._captions_stage()
        super().__init__(context, recipe, needs)

    @property
    def by_class(self) -> bool:
        """Whether the text is the name of the picture's class: of stage class, and of what goes on with its model."""
        if self.stage in ("class", "text") or self.start is None:
            return self.stage == "class"
        return (
            self.start.by_class
            if isinstance(self.start, OnLatents)
            else text_of_folder(self.start).get("name") == "labels"
        )

    @property
    def live(self) -> bool:
        """Whether pictures are read and encoded in each step."""
        return self.recipe.data.live

    @property
    def size(self) -> int:
        """Side of the pictures in pixels."""
        return size_of(self.source)

    @property
    def label(self) -> str:
        return self.stage

    @property
    def uses(self) -> dict[str, Work]:
        given = {"held out": self.held_rows, "captions": self.captions_made}
        return {role: stage for role, stage in given.items() if stage is not None}

    def _choose_rows(self) -> None:
        """The rows to train on, and those to look at."""
        data = with_classes(self.recipe.data) if self.by_class else self.recipe.data
        # Held-out rows are not selected by score: of few rows perhaps none would be left. And they are stored, as one crop.
        looked_at = replace(data, min_score=None, score_column=None, crop=None)
        self.source: SourceSettings = data.source("train")
        self.held: SourceSettings | None = held_out(looked_at)
        if self.live and streamed(self.source):
            self.source = replace(self.source, train=None)  # which is what stage=vae stores of it
        if self.live and self.held is None:
            self.held = replace(looked_at.source("train"), train=FIRST)

    def _captions_stage(self) -> Captions | None:
        """Embeddings of the captions, where a frozen encoder is to make them."""
        found = self.frozen_text()
        if found is None:
            return None
        encoder, mark = found
        splits = [one for one in (self.train_rows, self.held_rows) if one is not None]
        prompts = [str(prompt) for prompt in self.recipe.preview.prompts or []]
        return Captions(self.context, splits, encoder, mark, prompts)

    def frozen_text(self) -> tuple[Any, str] | None:
        """What makes the frozen text encoder, and its fingerprint; None: it is trained here or knows classes."""
        return None

    def facts(self) -> dict[str, Any]:
        known = {
            "stage": self.stage,
            "seed": self.recipe.seed,
            "precision": self.recipe.compute.precision,
            "training": facts(self.training),
        }
        if self.live:  # what the order of the rows depends on
            order = {"processes": self.context.processes.count, "shares": max(self.recipe.data.workers, 1)}
            known |= {"data": fingerprint(self.source, self.context), "live": order | {"buffer": self.source.buffer}}
        return known

    def material(self) -> Material:
        """Latents and captions, as the stages before have made them."""
        held = None if self.held_rows is None else self.held_rows.cache()
        if self.live:
            self.opened = opened(self.source)
            known = self.opened.texts if isinstance(self.opened, Table) else held.rows
            self.text_of = class_namer(known, self.source) if self.by_class else caption_of
            captions = list(map(self.text_of, known)), list(map(self.text_of, held.rows))
            return Material(None, captions[0], Latents(held), captions[1], None)
        train = self.train_rows.cache()
        captions = self._captions(train), [] if held is None else self._captions(held)
        embedded = None if self.captions_made is None else self.captions_made.text()
        return Material(Latents(train), captions[0], None if held is None else Latents(held), captions[1], embedded)

    def _captions(self, cache: CachedLatents) -> list[str]:
        return class_names(cache.rows, self.source) if self.by_class else cache.captions

    def prompts(self, captions: list[str]) -> list[str]:
        """What the pictures of a look are of: preview.prompts, or the first different captions; as many as are shown."""
        chosen = self.recipe.preview
        given = [str(prompt) for prompt in chosen.prompts or []] or list(dict.fromkeys(captions))[: chosen.count]
        return [given[i % len(given)] for i in range(chosen.count)]


class FlowStage(OnLatents):
    """Train text encoder and generator on the latents of ``latent``."""

    @property
    def kind(self) -> str:  # type: ignore[override]
        """class, text or aesthetic: the first word of its key."""
        return self.stage

    @property
    def whole(self) -> bool:
        """Whether the start is this stage's model, not only its generator's weights."""
        return self.stage == "aesthetic"

    def frozen_text(self) -> tuple[Any, str] | None:
        if self.whole:
            return frozen_text_of(self.start)
        if self.recipe.model.text != "clip":
            return None
        return lambda: text_of(self.recipe, []), text_fingerprint(self.recipe)

    def check(self) -> None:
        recipe = self.recipe
        sampling_of(recipe, SAMPLING)
        _ = self.training.times
        check_mixer(recipe.model.mixer)
        if self.whole and recipe.data.min_score is None:
            raise SettingError(
                "data.min_score is missing: stage=aesthetic trains on the rows whose data.score_column reaches it"
            )
        classes = (self.by_class and recipe.data.label_column) or (not self.whole and self.text_name == "labels")
        if self.live and streamed(self.source) and classes and not recipe.data.labels:
            raise SettingError(
                "data.labels is missing: with data.live=true the classes of a stream must be known beforehand; name them "
                "all, as data.labels=[cat,dog], or set data.live=false"
            )
        if self.start is None:
            check_size(recipe, self.size)
            if self.text_name != "clip":
                parameters_of(generator_config(recipe, latent_sizes(recipe)[0], recipe.model.text_width))

    @property
    def text_name(self) -> str:
        """The kind of its text encoder: stage class knows classes, whatever follows it."""
        return "labels" if self.stage == "class" else self.recipe.model.text

    def facts(self) -> dict[str, Any]:
        # Aesthetic weights come from the text stage with all that they are.
        own = {} if self.whole else model_facts(self.recipe, self.text_name)
        return super().facts() | own

    def work(self) -> dict[str, Any]:
        recipe, device = self.recipe, self.context.processes.device
        start = read_folder(self.start.place) if self.start is not None else None
        named = load_latent(self.needs["latent"].place) if start is None else NamedLatent(*start[1:4])
        self.given = self.material()
        model = self._model(start, named)
        self.pipeline = lambda: IrisPipeline(model, *named, self.size, SAMPLING)
        held, held_captions = self.given.held, self.given.held_captions
        if self.live:
            batches = LiveBatches(
                self.opened, self.training.batch, recipe.seed, *self._share, recipe.data.workers, self.folder
            )
            live = {"live": batches, "latent": named.latent.to(device).eval(), "texts": self._texts}
            self.task = self.judged = self._task(model, held, held_captions, LiveFlowTask, **live)
            with contextlib.closing(batches):
                self.fit(self.task, self._look)
        else:
            self.task = self._task(model, self.given.latents, self.given.captions)
            self.judged = self.task if held is None else self._task(model, held, held_captions)
            self.fit(self.task, self._look)
        if self.context.processes.first:
            self.pipeline().save(self.place)
        self.pipeline().to("cpu")
        return {"metrics": {"validation_loss": validation_loss(self.judged)}, "example": shown(self.given.captions)}

    @property
    def _share(self) -> tuple[int, int]:
        """Which of the processes this is, and of how many."""
        return self.context.processes.rank, self.context.processes.count

    def _texts(self, batch: Any) -> list[str]:
        return [self.text_of(row) for row in rows_of(batch)]

    def _model(self, start: Any, named: NamedLatent) -> TextToLatent:
        """The model to train, drawn from the seed or taken from the start."""
        recipe, given = self.recipe, self.given
        if self.whole:
            return TextToLatent(given.embedded or start.model.text, start.model.generator)
        known = given.captions
        if self.text_name == "labels":  # a class that only held-out rows have is a class too
            known = known + given.held_captions
            if self.live and streamed(self.source):  # nor are a stream's first rows all that there is
                known += self.source.labels or ()
        encoder = given.embedded or text_of(recipe, known, self.text_name)
        config = generator_config(recipe, named.latent.channels, encoder.width)
        model = initialise(TextToLatent(encoder, Generator(config)), recipe.seed)
        if start is not None:
            adopt(model, start.model, recipe.start)
        return model

    def usage(self, weights: Path) -> list[str]:
        return [f'python -m iris --model {weights} "{self.result["example"]}"']

    def _task(
        self, model: TextToLatent, latents: Latents, captions: list[str], kind: type[FlowTask] = FlowTask, **more: Any
    ) -> FlowTask:
        train, encode = self.training, model.text.tokenise
        return kind(
            model,
            latents,
            encode(captions),
            encode([""])[0],
            train.batch,
            self.recipe.seed,
            train.caption_dropout,
            train.loss_weight,
            train.times,
            train.min_snr_gamma,
            train.steps,
            **more,
        )

    @torch.no_grad()
    def _look(self, step: int) -> Seen:
        """The loss on held-out rows (of training rows, where there are no others), and a grid of samples."""
        value = validation_loss(self.judged)
        if self.context.processes.first:
            prompts = self.prompts(self.given.held_captions or self.given.captions)
            pipeline = self.pipeline()
            pipeline.latent.to(pipeline.device)
            images = pipeline.generate(prompts, sampling_of(self.recipe, SAMPLING), self.recipe.seed).cpu().numpy()
            self.picture(f"samples-{step:06d}", images, columns_of(len(images)))
        return value, {}


class ClassStage(FlowStage):
    """What pictures look like, before any language."""

    stage = "class"


class TextStage(FlowStage):
    """The flow, conditioned on captions."""

    stage = "text"


class AestheticStage(FlowStage):
    """The text stage goes on with the rows whose data.score_column reaches data.min_score."""

    stage = "aesthetic"


def latent_behind(start: Work) -> Work:
    """The latent of weights: the stage that made it, or the folder that holds it, by the key that it has where it is known."""
    if isinstance(start, OnLatents):
        return start.needs["latent"]
    known = start.built_on.get("latent") if isinstance(start, Finished) else None
    return start if known is None else Finished(known, start.folder)


def frozen_text_of(start: Work) -> tuple[Any, str] | None:
    """The frozen text encoder of weights, as ``OnLatents.frozen_text``."""
    if isinstance(start, OnLatents):
        return start.frozen_text()
    about = text_of_folder(start)
    if about.get("name") != "clip":
        return None
    text = read_folder(start.place).model.text
    return lambda: read_folder(start.place).model.text, text.fingerprint()


def adopt(model: TextToLatent, start: TextToLatent, word: str | None) -> None:
    """Take the start's generator, and its text encoder too where it is the same one.

    Raises:
        SettingError: a generator of another shape; names what differs.
    """
    ours, theirs = (part.generator.config.to_dict() for part in (model, start))
    for name, value in ours.items():
        if theirs[name] != value:
            prefix = "" if name in ("mixers", "depth") else "model."
            there = f"{prefix}{name} is {theirs[name]} there"
            raise SettingError(f"start={word}: {there} and {value} here; they must be the same")
    model.generator.load_state_dict(start.generator.state_dict())
    if model.text.to_dict() == start.text.to_dict() and not model.text.frozen:
        model.text.load_state_dict(start.text.state_dict())


def text_of_folder(start: Work) -> Mapping[str, Any]:
    """What the configuration of a model's folder says of its text encoder.

    Raises:
        SettingError: no configuration of a pipeline; a latent's, for one.
    """
    folder = start.place
    try:
        text = json.loads((folder / CONFIG).read_text())["text"]
        return text if isinstance(text, Mapping) else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(f"start={folder}: {CONFIG} is none of a model with a generator") from error


def columns_of(count: int) -> int:
    """Of a grid about as wide as high."""
    return max(1, round(count**0.5))
