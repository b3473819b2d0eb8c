"""Captions to make images of, and real images: the drawn worlds and every other source behind one interface."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eval.judges import Judge
from eval.metrics.features import Features
from eval.metrics.images import to_float
from eval.settings import Data as DataSettings
from eval.stages.reference import ReferenceKey, reference
from iris import data as sources
from iris.data import WORLDS
from iris.data.world import World
from iris.errors import SettingError, require_choice
from iris.io.files import write_json
from iris.randomness import addressed

CHUNK = 256  # images held at once
DRAWN = 4096  # real images of a drawn world
SPLITS = ("train", "validation")

# Called with images done and in all, if that is known.
Ticks = Callable[[int, int | None], None]


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
        default_count: of real images, where none is set; None: all there are.
    """

    name: str
    split: str
    size: int
    world: World | None = None
    default_count: int | None = None

    @abstractmethod
    def fingerprint(self, split: str) -> str:
        """Hex digits of what determines the rows of a split, their number apart."""

    @abstractmethod
    def rows(self, split: str, count: int | None = None) -> Iterator[Rows]:
        """The first ``count`` rows, some at a time; None: all."""

    def captions(self, split: str, count: int) -> list[str]:
        """Up to ``count`` captions of a split."""
        return [caption for part in self.rows(split, count) for caption in part.captions]


class DrawnWorld(RealData):
    """A drawn world; see ``iris.data.world``."""

    default_count = DRAWN

    def __init__(self, settings: DataSettings, size: int) -> None:
        self.name, self.size, self.seed = settings.name, size, settings.seed or 0
        self.world = WORLDS[settings.name]
        require_choice("data.split", settings.split, tuple(self.world.tuples))
        self.split = settings.split

    def fingerprint(self, split: str) -> str:
        # Picture i depends on (world, split, seed, i) alone, so the counts are no part of it.
        return sources.fingerprint(self.name, size=self.size, seed=self.seed, train=0, validation=0, heldout=0)

    def rows(self, split: str, count: int | None = None) -> Iterator[Rows]:
        count = DRAWN if count is None else count
        for first in range(0, count, CHUNK):
            drawn = self.world.draw(split, min(CHUNK, count - first), self.seed, first, self.size)
            yield Rows(drawn.images, drawn.captions)

    @property
    def training_count(self) -> int:
        """Pictures that a model of this world is trained on by default."""
        return sources.sources.WORLD_COUNTS["train"]


class SourceData(RealData):
    """Any other source of ``iris.data``."""

    def __init__(self, settings: DataSettings, size: int) -> None:
        require_choice("data.split", settings.split, SPLITS)
        values = asdict(settings)
        self.name, self.split, self.size = values.pop("name"), values.pop("split"), size
        self._settings = values | {"size": size}
        self._source(self.split)  # errors now, not after the images were made

    @cached_property
    def _opened(self) -> dict[str, sources.Source]:
        return {}

    def _source(self, split: str) -> sources.Source:
        if split not in self._opened:
            self._opened[split] = sources.open_source(self.name, split=split, **self._settings)
        return self._opened[split]

    def fingerprint(self, split: str) -> str:
        return self._source(split).fingerprint()

    def rows(self, split: str, count: int | None = None) -> Iterator[Rows]:
        stream = islice(self._source(split).stream(shuffle=False), count)
        while part := list(islice(stream, CHUNK)):
            yield Rows(np.stack([row.image for row in part]), [row.caption for row in part])


def open_data(settings: DataSettings, size: int) -> RealData:
    """The data that the settings name, at a size in pixels.

    Raises:
        SettingError: as ``iris.data.open_source``.
    """
    return (DrawnWorld if settings.name in WORLDS else SourceData)(settings, size)


def features_of(
    judge: Judge, parts: Iterable[np.ndarray | Tensor], ticks: Ticks | None = None, total: int | None = None
) -> Tensor:
    """Judge features float32 [N, D] of images uint8 [n, H, W, 3], some at a time."""
    found, done = [], 0
    for part in parts:
        found.append(judge.image_features(to_float(torch.as_tensor(part))).cpu())
        done += len(part)
        if ticks is not None:
            ticks(done, total)
    return torch.cat(found) if found else torch.empty(0, judge.feature_width)


def real_features(judge: Judge, data: RealData, split: str, count: int | None, folder: Path, ticks: Ticks) -> Features:
    """Features of a split's real images, kept in ``folder``.

    Args:
        count: the first so many; None: the data's own choice.

    Raises:
        SettingError: there are fewer.
    """
    fingerprint, wanted = data.fingerprint(split), data.default_count if count is None else count
    known, found = folder / f"{data.name}-{split}-{fingerprint}.json", None  # the file: how many usable rows
    if wanted is None and known.is_file():
        wanted = json.loads(known.read_text())["count"]

    def make() -> Tensor:
        made = features_of(judge, (part.images for part in data.rows(split, wanted)), ticks, wanted)
        if wanted is not None and len(made) < wanted:
            raise SettingError(
                f"measure.reference={wanted}: split {split} of data {data.name} has only {len(made)} usable rows"
            )
        return made

    if wanted is None:
        found = make()
        wanted = len(found)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(known, {"count": wanted})
    key = ReferenceKey.of(judge, fingerprint, split, data.size, wanted)
    return reference(key, make if found is None else lambda: found, folder)


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
