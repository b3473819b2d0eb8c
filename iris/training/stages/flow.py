"""Stages class, text and aesthetic: the flow, conditioned on classes or captions, from nothing or from weights."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from iris.data.latent_cache import CachedLatents, encode_source
from iris.errors import SettingError
from iris.generator import Generator
from iris.mixers import check_mixer
from iris.pipeline import IrisPipeline
from iris.randomness import initialise
from iris.saved import CONFIG, read_folder
from iris.text import CLIPText, EmbeddedText, TextEncoder, embed_captions
from iris.training.files import write_json
from iris.training.safety import explained_memory
from iris.training.stages.base import Seen, Stage, shown
from iris.training.stages.data import (
    Latents,
    class_names,
    described,
    fingerprint,
    held_out,
    opened,
    size_of,
    streamed,
    with_classes,
)
from iris.training.stages.parts import (
    generator_config,
    latent_of,
    model_facts,
    sampling_of,
    text_of,
    times_of,
    train_facts,
)
from iris.training.stages.vae import NamedLatent, load_latent
from iris.training.tasks import FlowTask, TextToLatent, validation_loss

PREPARED = "prepared.json"
BATCH = 64              # pictures encoded at once


class Encoded(NamedTuple):
    """What the flow is trained on: latents, what each is of, and the encoder for that."""

    latents: Latents
    captions: list[str]
    held: Latents | None
    held_captions: list[str]
    embedded: EmbeddedText | None


class LatentStage(Stage):
    """What the flow's stages and distillation share: a data set as latents and captions, on disk."""

    @property
    def by_class(self) -> bool:
        """Whether the text is the name of the picture's class: of stage class, and of what goes on with its model."""
        start = self.earlier.get("start")
        if self.name in ("class", "text") or start is None:
            return self.name == "class"
        return start.by_class if isinstance(start, LatentStage) else knows_classes(start.folder)

    def check(self) -> None:
        data = with_classes(self.settings.data) if self.by_class else self.settings.data
        # Held-out rows are not selected by score: of few rows perhaps none would be left.
        self.data, self.held = described(data, "train"), held_out(replace(data, min_score=None, score_column=None))
        self.size = size_of(self.data)
        sampling_of(self.settings)

    def facts(self) -> dict[str, Any]:
        train = train_facts(self.settings.train)
        facts = {"data": fingerprint(self.data), "store": self.settings.latent.store, "train": train}
        # Not the key of earlier versions, which trained on all rows of a stream whatever data.train was.
        return facts | ({"rows": self.data.train} if streamed(self.data) and self.data.train else {})

    def encoded(self, named: NamedLatent, text: TextEncoder | None) -> Encoded:
        """Encode pictures, and, for a frozen text encoder (None: not known yet), captions; what is on disk is used."""
        named.latent.grid(self.size, self.size)
        # Of a run from before: the others wait until the first process has read through what it names.
        self.desk.processes.agree(lambda: (self.folder / PREPARED).unlink(missing_ok=True))
        self.desk.processes.prepared(self.folder / PREPARED, lambda: self._prepare(named, text))
        places = json.loads((self.folder / PREPARED).read_text())
        train = CachedLatents(places["train"])
        held = CachedLatents(places["held"]) if places["held"] else None
        embedded = EmbeddedText(places["text"]) if places["text"] else None
        captions = self._captions(train), [] if held is None else self._captions(held)
        return Encoded(Latents(train), captions[0], None if held is None else Latents(held), captions[1], embedded)

    def _prepare(self, named: NamedLatent, text: TextEncoder | None) -> None:
        places: dict[str, str | None] = {"train": None, "held": None, "text": None}
        captions: list[str] = []
        latent = named.latent.to(self.desk.processes.device)
        for part, chosen in (("train", self.data), ("held", self.held)):
            if chosen is not None:
                source = opened(chosen)
                total = len(source) if hasattr(source, "__len__") else source.limit
                report = partial(self._report, f"encoding {chosen.split} pictures", total=total)
                with explained_memory(self._advice):
                    place = encode_source(latent, source, self.desk.stages / "latents", self.settings.latent.store,
                                          BATCH, report)
                places[part] = str(place.absolute())
                captions += self._captions(CachedLatents(place))
        if isinstance(text, CLIPText):
            made = embed_captions(text.to(self.desk.processes.device), [*captions, *self._prompts(captions)],
                                  self.desk.stages / "text", report=partial(self._report, "embedding captions"))
            text.to("cpu")
            places["text"] = str(made.absolute())
        write_json(self.folder / PREPARED, places)

    def _advice(self) -> str:
        return f"while {BATCH} pictures were encoded at once with data.size={self.size}: lower data.size"

    def _report(self, work: str, done: int, total: int | None) -> None:
        self.desk.progress.done(work, done, total)

    def _captions(self, cache: CachedLatents) -> list[str]:
        return class_names(cache.rows, self.data) if self.by_class else cache.captions

    def _prompts(self, captions: list[str]) -> list[str]:
        """What the pictures of a look are of: sample.prompts, or the first different captions."""
        if self.settings.sample.prompts:
            return [str(prompt) for prompt in self.settings.sample.prompts]
        return list(dict.fromkeys(captions))[: self.settings.sample.count]


class FlowStage(LatentStage):
    """Train text encoder and generator, with the latent of ``earlier``: of vae, or of the weights it starts from."""

    def check(self) -> None:
        super().check()
        settings = self.settings
        times_of(settings.train)
        check_mixer(settings.model.mixer)
        if self.name == "aesthetic" and settings.data.min_score is None:
            raise SettingError("data.min_score is missing: stage=aesthetic trains on the rows whose data.score_column "
                               "reaches it")
        if "start" not in self.earlier:
            latent = latent_of(settings)
            latent.grid(self.size, self.size)
            if settings.model.text != "clip":
                with torch.device("meta"):
                    Generator(generator_config(settings, latent.channels, settings.model.text_width))

    def facts(self) -> dict[str, Any]:
        # Aesthetic weights come from the text stage with all that they are.
        own = {} if self.name == "aesthetic" else model_facts(self.settings)
        return super().facts() | own

    def train(self, given: dict[str, Path]) -> dict[str, Any]:
        settings = self.settings
        start = read_folder(given["start"]) if "start" in given else None
        named = load_latent(given["vae"]) if start is None else NamedLatent(*start[1:4])
        whole = self.name == "aesthetic"            # the start is this stage's model, not only its generator's weights
        text = start.model.text if whole else text_of(settings, []) if settings.model.text == "clip" else None
        self.encodings = self.encoded(named, text)
        known = self.encodings.captions
        if settings.model.text == "labels":         # a class that only held-out rows have is a class too
            known = known + self.encodings.held_captions
        encoder = self.encodings.embedded or text or text_of(settings, known)
        if whole:
            model = TextToLatent(encoder, start.model.generator)
        else:
            config = generator_config(settings, named.latent.channels, encoder.width)
            model = initialise(TextToLatent(encoder, Generator(config)), settings.seed)
            if start is not None:
                adopt(model, start.model, settings.start)
        self.pipeline = lambda: IrisPipeline(model, named.latent, named.name, named.options, self.size)
        self.task = self._task(model, self.encodings.latents, self.encodings.captions)
        held = self.encodings.held
        self.judged = self.task if held is None else self._task(model, held, self.encodings.held_captions)
        self.fit(self.task, self._look)
        if self.desk.processes.first:
            self.pipeline().save(self.weights)
        self.pipeline().to("cpu")
        return {"metrics": {"validation": validation_loss(self.judged)}, "example": shown(self.encodings.captions)}

    def usage(self, weights: Path, result: dict[str, Any]) -> list[str]:
        return [f'python -m iris --model {weights} "{result["example"]}"']

    def _task(self, model: TextToLatent, latents: Latents, captions: list[str]) -> FlowTask:
        train, encode = self.settings.train, model.text.tokenise
        return FlowTask(model, latents, encode(captions), encode([""])[0], train.batch, self.settings.seed,
                        train.caption_dropout, train.loss_weight, times_of(train), train.min_snr_gamma, train.steps)

    @torch.no_grad()
    def _look(self, step: int) -> Seen:
        """The loss on held-out rows (of training rows, where there are no others), and a grid of samples."""
        value = validation_loss(self.judged)
        if self.desk.processes.first:
            prompts = self._prompts(self.encodings.held_captions or self.encodings.captions)
            prompts = [prompts[i % len(prompts)] for i in range(self.settings.sample.count)]
            pipeline = self.pipeline()
            pipeline.latent.to(pipeline.device)
            images = pipeline.generate(prompts, sampling_of(self.settings), self.settings.seed).cpu().numpy()
            self.picture(f"samples-{step:06d}", images, columns_of(len(images)))
        return value, {}


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
            raise SettingError(f"from={word}: {there} and {value} here; they must be the same")
    model.generator.load_state_dict(start.generator.state_dict())
    if model.text.to_dict() == start.text.to_dict() and not model.text.frozen:
        model.text.load_state_dict(start.text.state_dict())


def knows_classes(folder: Path) -> bool:
    """Whether a pipeline's folder holds a model of classes.

    Raises:
        SettingError: no configuration of a pipeline.
    """
    try:
        return json.loads((folder / CONFIG).read_text())["text"]["name"] == "labels"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(f"from={folder}: {CONFIG} is not one that a pipeline wrote") from error


def columns_of(count: int) -> int:
    """Of a grid about as wide as high."""
    return max(1, round(count**0.5))
