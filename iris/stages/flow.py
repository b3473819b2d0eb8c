"""Stages class, text and aesthetic: the flow, conditioned on classes or captions, from nothing or from weights."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from iris.data.table import Table
from iris.errors import SettingError
from iris.io.files import write_json
from iris.model import CONFIG, TextToLatent, read_folder
from iris.nn.generator import Generator
from iris.nn.mixers import check_mixer
from iris.pipeline import IrisPipeline
from iris.randomness import initialise
from iris.stages.base import Seen, Stage, shown
from iris.stages.data import (
    Latents,
    caption_of,
    class_namer,
    class_names,
    described,
    fingerprint,
    held_out,
    opened,
    rows_of,
    size_of,
    streamed,
    with_classes,
)
from iris.stages.latent_cache import CachedLatents, encode_source
from iris.stages.parts import generator_config, latent_of, model_facts, sampling_of, text_of, times_of, train_facts
from iris.stages.vae import NamedLatent, load_latent
from iris.text import CLIPText, EmbeddedText, TextEncoder, embed_captions
from iris.training.live import LiveBatches, LiveFlowTask
from iris.training.safety import explained_memory
from iris.training.tasks import FlowTask, validation_loss

PREPARED = "prepared.json"
BATCH = 64  # pictures encoded at once
FIRST = 512  # rows that are looked at where none are held out of live data


class Encoded(NamedTuple):
    """What the flow is trained on: latents, what each is of, and the encoder for that.

    With data.live there are no latents, and the captions are those that are known beforehand: all of a table, those of the
    first rows of a stream.
    """

    latents: Latents | None
    captions: list[str]
    held: Latents | None
    held_captions: list[str]
    embedded: EmbeddedText | None


class LatentStage(Stage):
    """What the flow's stages and distillation share: a data set as latents and captions, on disk or live."""

    @property
    def by_class(self) -> bool:
        """Whether the text is the name of the picture's class: of stage class, and of what goes on with its model."""
        start = self.earlier.get("start")
        if self.name in ("class", "text") or start is None:
            return self.name == "class"
        return start.by_class if isinstance(start, LatentStage) else knows_classes(start.folder)

    @property
    def live(self) -> bool:
        """Whether pictures are read and encoded in each step."""
        return self.settings.data.live

    def check(self) -> None:
        data = with_classes(self.settings.data) if self.by_class else self.settings.data
        # Held-out rows are not selected by score: of few rows perhaps none would be left. And they are stored, as one crop.
        looked_at = replace(data, min_score=None, score_column=None, crop=None)
        self.data, self.held = described(data, "train"), held_out(looked_at)
        if self.live and streamed(self.data):
            self.data = replace(self.data, train=None)  # which is what stage=vae stores of it
        if self.live and self.held is None:
            self.held = replace(described(looked_at, "train"), train=FIRST)
        self.size = size_of(self.data)
        sampling_of(self.settings)

    def facts(self) -> dict[str, Any]:
        facts = {"data": fingerprint(self.data), "train": train_facts(self.settings.train)}
        if self.live:  # what the order of the rows depends on
            order = {"processes": self.desk.processes.count, "shares": max(self.settings.data.workers, 1)}
            return facts | {"live": order | {"buffer": self.data.buffer}}
        facts |= {"store": self.settings.latent.store}
        # Not the key of earlier versions, which trained on all rows of a stream whatever data.train was.
        return facts | ({"rows": self.data.train} if streamed(self.data) and self.data.train else {})

    def encoded(self, named: NamedLatent, text: TextEncoder | None) -> Encoded:
        """Encode pictures, and, for a frozen text encoder (None: not known yet), captions; what is on disk is used."""
        named.latent.grid(self.size, self.size)
        # Of a run from before: the others wait until the first process has read through what it names.
        self.desk.processes.agree(lambda: (self.folder / PREPARED).unlink(missing_ok=True))
        self.desk.processes.prepared(self.folder / PREPARED, lambda: self._prepare(named, text))
        places = json.loads((self.folder / PREPARED).read_text())
        held = CachedLatents(places["held"]) if places["held"] else None
        if self.live:
            self.source = opened(self.data)
            known = self.source.texts if isinstance(self.source, Table) else held.rows
            self.text_of = class_namer(known, self.data) if self.by_class else caption_of
            captions = list(map(self.text_of, known)), list(map(self.text_of, held.rows))
            return Encoded(None, captions[0], Latents(held), captions[1], None)
        train = CachedLatents(places["train"])
        embedded = EmbeddedText(places["text"]) if places["text"] else None
        captions = self._captions(train), [] if held is None else self._captions(held)
        return Encoded(Latents(train), captions[0], None if held is None else Latents(held), captions[1], embedded)

    def _prepare(self, named: NamedLatent, text: TextEncoder | None) -> None:
        places: dict[str, str | None] = {"train": None, "held": None, "text": None}
        captions: list[str] = []
        latent = named.latent.to(self.desk.processes.device)
        for part, chosen in (("train", None if self.live else self.data), ("held", self.held)):
            if chosen is not None:
                source = opened(chosen)
                total = len(source) if hasattr(source, "__len__") else source.limit
                report = partial(self._report, f"encoding {chosen.split} pictures", total=total)
                with explained_memory(self._advice):
                    place = encode_source(
                        latent, source, self.desk.stages / "latents", self.settings.latent.store, BATCH, report
                    )
                places[part] = str(place.absolute())
                captions += self._captions(CachedLatents(place))
        if isinstance(text, CLIPText) and not self.live:
            made = embed_captions(
                text.to(self.desk.processes.device),
                [*captions, *self._prompts(captions)],
                self.desk.stages / "text",
                report=partial(self._report, "embedding captions"),
            )
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
            raise SettingError(
                "data.min_score is missing: stage=aesthetic trains on the rows whose data.score_column reaches it"
            )
        classes = (self.by_class and self.data.label_column) or (
            self.name != "aesthetic" and settings.model.text == "labels"
        )
        if self.live and streamed(self.data) and classes and not self.data.labels:
            raise SettingError(
                "data.labels is missing: with data.live=true the classes of a stream must be known "
                "beforehand; name them all, as data.labels=[cat,dog], or set data.live=false"
            )
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
        whole = self.name == "aesthetic"  # the start is this stage's model, not only its generator's weights
        text = start.model.text if whole else text_of(settings, []) if settings.model.text == "clip" else None
        self.encodings = self.encoded(named, text)
        known = self.encodings.captions
        if settings.model.text == "labels":  # a class that only held-out rows have is a class too
            known = known + self.encodings.held_captions
            if self.live and streamed(self.data):  # nor are a stream's first rows all that there is
                known += self.data.labels or ()
        encoder = self.encodings.embedded or text or text_of(settings, known)
        if whole:
            model = TextToLatent(encoder, start.model.generator)
        else:
            config = generator_config(settings, named.latent.channels, encoder.width)
            model = initialise(TextToLatent(encoder, Generator(config)), settings.seed)
            if start is not None:
                adopt(model, start.model, settings.start)
        self.pipeline = lambda: IrisPipeline(model, named.latent, named.name, named.options, self.size)
        held, held_captions = self.encodings.held, self.encodings.held_captions
        if self.live:
            batches = self._batches()
            self.task = self.judged = self._task(
                model,
                held,
                held_captions,
                LiveFlowTask,
                live=batches,
                latent=named.latent.to(self.desk.processes.device).eval(),
                texts=lambda batch: [self.text_of(row) for row in rows_of(batch)],
            )
            with contextlib.closing(batches):
                self.fit(self.task, self._look)
        else:
            self.task = self._task(model, self.encodings.latents, self.encodings.captions)
            self.judged = self.task if held is None else self._task(model, held, held_captions)
            self.fit(self.task, self._look)
        if self.desk.processes.first:
            self.pipeline().save(self.weights)
        self.pipeline().to("cpu")
        return {"metrics": {"validation": validation_loss(self.judged)}, "example": shown(self.encodings.captions)}

    def usage(self, weights: Path, result: dict[str, Any]) -> list[str]:
        return [f'python -m iris --model {weights} "{result["example"]}"']

    def _task(
        self, model: TextToLatent, latents: Latents, captions: list[str], kind: type[FlowTask] = FlowTask, **more: Any
    ) -> FlowTask:
        train, encode = self.settings.train, model.text.tokenise
        return kind(
            model,
            latents,
            encode(captions),
            encode([""])[0],
            train.batch,
            self.settings.seed,
            train.caption_dropout,
            train.loss_weight,
            times_of(train),
            train.min_snr_gamma,
            train.steps,
            **more,
        )

    def _batches(self) -> LiveBatches:
        """This process's rows of each step."""
        settings, processes = self.settings, self.desk.processes
        return LiveBatches(
            self.source,
            settings.train.batch,
            settings.seed,
            processes.rank,
            processes.count,
            settings.data.workers,
            self.folder,
        )

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
