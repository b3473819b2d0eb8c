"""Captions to make images of, and real images: the drawn worlds and every other source behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from iris import data as sources
from iris.data import WORLDS
from iris.data.settings import Data
from iris.data.world import World
from iris.errors import require_choice
from iris.randomness import addressed

CHUNK = 256  # images held at once
SPLITS = ("train", "validation")


class Rows(NamedTuple):
    """Real images uint8 [n, size, size, 3] with their captions [n]."""

    images: np.ndarray
    captions: list[str]


class RealData(ABC):
    """Captioned real images.

    Attributes:
        name: of the source.
        split: that captions are taken from and images are compared with.
        size: side of the images in pixels.
        world: the drawn world, if it is one.
    """

    name: str
    split: str
    size: int
    world: World | None = None

    @abstractmethod
    def fingerprint(self, split: str) -> str:
        """Hex digits of what determines the rows of a split, their number apart."""

    @abstractmethod
    def rows(self, split: str, count: int | None = None) -> Iterator[Rows]:
        """The first ``count`` rows, some at a time; None: all."""

    def default_count(self, split: str) -> int | None:
        """Real images of a split, where none is set; None: all there are."""
        return None

    def captions(self, split: str, count: int) -> list[str]:
        """Up to ``count`` captions of a split."""
        return [caption for part in self.rows(split, count) for caption in part.captions]


class DrawnWorld(RealData):
    """A drawn world; see ``iris.data.world``."""

    def __init__(self, settings: Data, split: str, size: int) -> None:
        self.name, self.size, self.seed = settings.name, size, settings.seed or 0
        self.world = WORLDS[settings.name]
        require_choice("measure.split", split, tuple(self.world.tuples))
        self.split, self._counts = split, {name: getattr(settings, name) for name in sources.sources.WORLD_COUNTS}
        sources.fingerprint(self.name, **self._counts)  # refuses what is no count

    def fingerprint(self, split: str) -> str:
        # Picture i depends on (world, split, seed, i) alone, so the counts are no part of it.
        return sources.fingerprint(self.name, size=self.size, seed=self.seed, train=0, validation=0, heldout=0)

    def default_count(self, split: str) -> int:
        counts = sources.sources.WORLD_COUNTS
        return self._counts.get(split) or counts.get(split, counts["validation"])

    def rows(self, split: str, count: int | None = None) -> Iterator[Rows]:
        count = self.default_count(split) if count is None else count
        for first in range(0, count, CHUNK):
            drawn = self.world.draw(split, min(CHUNK, count - first), self.seed, first, self.size)
            yield Rows(drawn.images, drawn.captions)

    def captions(self, split: str, count: int, seed: int | None = None) -> list[str]:
        """``count`` captions of a split, without drawing a picture; ``seed``: of other pictures than the data's own."""
        return self.world.captions(split, count, self.seed if seed is None else seed)


class SourceData(RealData):
    """Any other source of ``iris.data``."""

    def __init__(self, settings: Data, split: str, size: int) -> None:
        require_choice("measure.split", split, SPLITS)
        self.name, self.split, self.size = settings.name, split, size
        # What is measured is not selected by score, and is one crop.
        self._settings = replace(settings, size=size, crop=None, score_column=None, min_score=None, live=False)
        self._opened: dict[str, sources.Source] = {}
        self._prints: dict[str, str] = {}  # kept, as a source looks into its files for each
        self._source(self.split)  # errors now, not after the images were made

    def _source(self, split: str) -> sources.Source:
        if split not in self._opened:
            given = vars(self._settings.source(split))
            self._opened[split] = sources.open_source(given["name"], **{k: v for k, v in given.items() if k != "name"})
        return self._opened[split]

    def fingerprint(self, split: str) -> str:
        if split not in self._prints:
            self._prints[split] = self._source(split).fingerprint()
        return self._prints[split]

    def rows(self, split: str, count: int | None = None) -> Iterator[Rows]:
        stream = islice(self._source(split).stream(shuffle=False), count)
        while part := list(islice(stream, CHUNK)):
            yield Rows(np.stack([row.image for row in part]), [row.caption for row in part])


def open_data(settings: Data, split: str, size: int) -> RealData:
    """The data that the settings name, at a size in pixels.

    Raises:
        SettingError: as ``iris.data.open_source``; no such split.
    """
    return (DrawnWorld if settings.name in WORLDS else SourceData)(settings, split, size)


def in_parts(images: np.ndarray, captions: list[str]) -> Iterator[Rows]:
    """Images and captions, some at a time."""
    for i in range(0, len(images), CHUNK):
        yield Rows(np.ascontiguousarray(images[i : i + CHUNK]), captions[i : i + CHUNK])


def attributes_of(world: World, captions: Sequence[str]) -> dict[str, np.ndarray] | None:
    """Attribute -> class [N] that captions of a drawn world name; None if one of them is not a caption of it."""
    table = _table(world.name)
    rows = [table.get(caption) for caption in captions]
    return None if None in rows else world.columns(world.tuples["all"][np.asarray(rows, np.int64)])


@cache
def _table(name: str) -> dict[str, int]:
    """Caption -> number of its attribute tuple."""
    world = WORLDS[name]
    attributes = world.columns(world.tuples["all"])
    return {
        caption: i
        for phrasing in range(world.phrasings)
        for i, caption in enumerate(world.caption(attributes, phrasing))
    }


def fresh_pictures(world: World, captions: Sequence[str], count: int, seed: int, size: int) -> Iterator[np.ndarray]:
    """New real pictures of what the captions show, ``count`` in all, in turn: uint8 [n, size, size, 3] at a time."""
    attributes = attributes_of(world, captions)
    for first in range(0, count, CHUNK):
        rows = np.arange(first, min(first + CHUNK, count))
        jitter = torch.rand(len(rows), world.jitters, generator=addressed(seed, "fresh pictures", first)).numpy()
        yield world.render({name: values[rows % len(captions)] for name, values in attributes.items()}, jitter, size)


def described(data: RealData) -> dict[str, Any]:
    """What a record says of the data."""
    return {"name": data.name, "split": data.split, "size": data.size, "fingerprint": data.fingerprint(data.split)}
