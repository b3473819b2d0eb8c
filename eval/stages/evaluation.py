"""One evaluation while it runs: its subject, data and judge, the images they share, and the results so far."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from eval.judges import Judge
from eval.metrics.features import Features, judge_facts
from eval.report.results import Number, Results
from eval.settings import Settings
from eval.stages.data import RealData, Ticks, features_of, real_features
from eval.stages.samples import Samples, make_samples
from eval.subjects import Subject
from iris.errors import SettingError
from iris.io.progress import Progress

MAIN, HELDOUT, TRAINED = "main", "heldout", "trained"  # sets of images: what their captions are
SECONDS = 1.0  # between two signs of life while other processes work


@dataclass
class Evaluation:
    """What the measures share.

    Attributes:
        count: images of the main set.
        out: folder of the results.
        rows: set -> column -> value an image, for per_image.csv.
    """

    settings: Settings
    subject: Subject
    data: RealData
    judge: Judge | None
    count: int
    out: Path
    progress: Progress
    results: Results
    rows: dict[str, dict[str, Sequence[Any]]] = field(default_factory=dict)

    @property
    def cache(self) -> Path:
        """Where images and features are kept for the next command."""
        return Path(self.settings.runs_dir) / "eval"

    @cached_property
    def captions(self) -> list[str] | None:
        """Of the main set."""
        if self.subject.count is not None:
            return None if self.subject.captions is None else self.subject.captions[: self.count]
        return self.data.captions(self.data.split, self.count)

    @cached_property
    def main(self) -> Samples:
        """Images of the data's captions, or those that are stored."""
        return self.make(MAIN, self.captions, self.count)

    def make(self, name: str, captions: list[str] | None, count: int) -> Samples:
        """A set of images; its captions go to per_image.csv."""
        words = {MAIN: "images", HELDOUT: "images of held-out combinations", TRAINED: "images of training captions"}
        try:
            made = make_samples(
                self.subject, captions, count, self.settings.seed, self.cache / "samples", self.ticks(words[name])
            )
        except ValueError as error:  # what cannot be measured, such as pixels that are not finite
            raise SettingError(str(error)) from error
        if made.cached:
            self.progress.say(f"{count:,} {words[name]} found, made by an earlier command")
        self.results.model |= made.facts
        self.rows.setdefault(name, {"caption": captions or [""] * count})
        return made

    @cached_property
    def features(self) -> Features:
        """Judge features of the main set."""
        return self.features_of(self.main.images, "images")

    def features_of(self, images: Any, name: str) -> Features:
        """Judge features of images uint8 [N, H, W, 3]."""
        parts = (images[i : i + 256] for i in range(0, len(images), 256))
        values = features_of(self.judge, parts, self.ticks(f"judge {self.judge.name}: {name}"), len(images))
        made_with = {**judge_facts(self.judge, self.subject.size), "metric_name": self.judge.metric_name}
        return Features.of(values, made_with)

    def real(self, split: str, count: int | None) -> Features:
        """Judge features of real images, from the cache if they are there."""
        return real_features(
            self.judge,
            self.data,
            split,
            count,
            self.cache / "references",
            self.ticks(f"judge {self.judge.name}: real images of {split}"),
        )

    def ticks(self, work: str) -> Ticks:
        """Tells the progress of a work."""
        return lambda done, total: self.progress.done(work, done, total)

    def add(self, name: str, number: Number, **facts: Any) -> None:
        """Keep a number with all that it was made with."""
        model = (
            {
                "images_seed": self.settings.seed,
                "sampling": self.subject.sampling,
                "dtype": self.subject.dtype,
                "device": self.subject.device,
            }
            if self.subject.count is None
            else {}
        )
        machine = {
            name: self.results.hardware[name] for name in ("processor", "gpu", "torch") if name in self.results.hardware
        }
        self.results.numbers[name] = number.with_facts({**facts, **model, "hardware": machine})

    def judged(self, **facts: Any) -> dict[str, Any]:
        """What numbers of the judge were made with."""
        return {**judge_facts(self.judge, self.subject.size), "threads": torch.get_num_threads(), **facts}


@contextmanager
def waiting(progress: Progress, work: str) -> Iterator[None]:
    """Signs of life while ``work`` goes on in other processes: seconds, on the progress's line."""
    ended, began = threading.Event(), time.monotonic()

    def beat() -> None:
        while not ended.wait(SECONDS):
            progress.done(f"{work}, seconds so far:", int(time.monotonic() - began))

    thread = threading.Thread(target=beat, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def image_count(settings: Settings, subject: Subject, default: int) -> int:
    """Images of the main set.

    Raises:
        SettingError: more are asked for than are stored.
    """
    wanted = settings.measure.samples
    if subject.count is None:
        return default if wanted is None else wanted
    if wanted is not None and wanted > subject.count:
        raise SettingError(f"measure.samples={wanted}: {subject.model} holds {subject.count} images")
    return subject.count if wanted is None else wanted
