"""Stage data: the pictures of a split, decoded once; and what stages ask of a data set's rows and classes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iris.data import WORLDS, SourceSettings, open_source
from iris.data import fingerprint as world_fingerprint
from iris.data.settings import Data
from iris.data.source import Batch, Source
from iris.data.table import Table
from iris.errors import SettingError
from iris.io.files import naming, write_json
from iris.io.hashing import digest, file_sha256
from iris.stages.engine import Context, Stage

ABOUT, PIXELS = "about.json", "pixels.bin"
CHUNK = 256  # rows decoded at once
WORLD_CLASS = "shape"  # the attribute that is a drawn picture's class, unless data.label_column names another

Row = dict[str, Any]  # "caption", "label", and what else is known of it


class Pictures(Stage):
    """The pictures of one split, uint8 [N, size, size, 3], in the source's order; at most data.train of a stream."""

    kind = "data"

    def __init__(self, context: Context, source: SourceSettings) -> None:
        super().__init__(context)
        self.source = source

    @property
    def label(self) -> str:
        return f"data {self.source.name}, {self.source.split}"

    def facts(self) -> dict[str, Any]:
        return {"data": fingerprint(self.source, self.context)} | (
            {"rows": self.source.train} if streamed(self.source) else {}
        )

    def settings(self) -> dict[str, Any]:
        return vars(self.source)

    def work(self) -> dict[str, Any]:
        source, folder = opened(self.source), self.folder
        total = len(source) if isinstance(source, Table) else source.limit
        if total is None:
            each = f"{self.source.size**2 * 3 / 1000:.0f} kB"
            raise SettingError(
                f"data.train is needed with data={self.source.name}: how many rows of {self.source.path} to store at "
                f"{each} each"
            )
        stream, done, sha256 = islice(source.stream(shuffle=False), total), 0, hashlib.sha256()
        with naming(folder / PIXELS), open(folder / PIXELS, "wb") as file:
            while examples := list(islice(stream, CHUNK)):
                images = np.stack([example.image for example in examples]).tobytes()
                file.write(images)
                sha256.update(images)
                done += len(examples)
                self.context.progress.done(f"storing {self.source.split} pictures", done, total)
            file.flush()
            os.fsync(file.fileno())
        if not done:
            raise SettingError(f"data={self.source.name}: there is no usable row")
        side = size_of(self.source)
        write_json(folder / ABOUT, {"shape": [done, side, side, 3], "sha256": sha256.hexdigest()})
        return {"pictures": done}

    def pixels(self) -> Pixels:
        """The pictures, read through.

        Raises:
            SettingError: they are not those that were stored.
        """
        _check_pixels(self.folder)
        return Pixels(self.folder)


class Pixels:
    """Pictures uint8 [N, size, size, 3] on disk; ``pixels[rows]`` reads them as a tensor."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / PIXELS
        self.shape = tuple(json.loads((folder / ABOUT).read_text())["shape"])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        # Mapped anew each time: what a held map has touched counts as this process's memory, in the end the whole file.
        mapped = np.memmap(self._path, np.uint8, "r", shape=self.shape)
        return torch.from_numpy(np.array(mapped[rows if isinstance(rows, slice) else rows.numpy()]))


def _check_pixels(folder: Path) -> None:
    about, path = json.loads((folder / ABOUT).read_text()), folder / PIXELS
    expected, size = int(np.prod(about["shape"])), path.stat().st_size if path.exists() else -1
    problem = None
    if size != expected:
        problem = "missing" if size < 0 else f"{size} bytes long instead of {expected}"
    elif file_sha256(path) != about["sha256"]:
        problem = "changed since it was written (another sha256)"
    if problem is not None:
        raise SettingError(f"pictures {folder}: {PIXELS} is {problem}; delete the folder to store them anew")


# -- sources ----------------------------------------------------------------------------------------------------------


def unselected(data: Data) -> Data:
    """The same without data.score_column and data.min_score, which select for the stage that a command names."""
    return replace(data, score_column=None, min_score=None)


def stored(data: Data) -> Data:
    """The same as pictures that are stored have it: centred crops, nothing read live."""
    return replace(data, live=False, workers=0, crop=None)


def with_classes(data: Data) -> Data:
    """The same rows with their class numbers, where a drawn world has them."""
    drawn = data.name in WORLDS and data.label_column is None
    return replace(data, label_column=WORLD_CLASS) if drawn else data


def opened(source: SourceSettings) -> Source:
    """The source of these settings."""
    given = {name: value for name, value in vars(source).items() if name != "name"}
    return open_source(source.name, **given)


def held_out(data: Data) -> SourceSettings | None:
    """The validation split, where there is one: not of streams, nor when data.validation is 0."""
    source = data.source("validation")
    return None if streamed(source) or data.validation == 0 else source


def streamed(source: SourceSettings) -> bool:
    """Whether its rows come one after the other, their number unknown."""
    return source.name == "tar" or (source.name == "hub" and source.streaming)


def fingerprint(source: SourceSettings, context: Context) -> str:
    """16 hex digits of what determines a source's examples; of a drawn world without drawing it."""
    known = context.fingerprints
    if source not in known:
        known[source] = _drawn(source) if source.name in WORLDS else opened(source).fingerprint()
    return known[source]


def _drawn(source: SourceSettings) -> str:
    counts = {name: getattr(source, name) for name in ("train", "validation", "heldout")}
    counts = {name: count if name == source.split else 0 for name, count in counts.items()}
    world = world_fingerprint(source.name, size=source.size, seed=source.seed, **counts)
    return digest([world, source.split, source.label_column, source.score_column, source.min_score])


def size_of(source: SourceSettings) -> int:
    """Side of the pictures in pixels."""
    return source.size or WORLDS[source.name].size


# -- classes ----------------------------------------------------------------------------------------------------------


def class_names(rows: Sequence[Row], source: SourceSettings) -> list[str]:
    """The class of each row: the name of its label where names are known, its caption where there are no labels.

    Labels without names keep their captions if each label has one of its own, and else are named by their numbers.
    """
    name = class_namer(rows, source)
    return [name(row) for row in rows]


def class_namer(rows: Sequence[Row], source: SourceSettings) -> Callable[[Row], str]:
    """The class of a row, as ``class_names`` of ``rows`` has it; other rows may follow."""
    captions, labels = [row["caption"] for row in rows], [row["label"] for row in rows]
    if None in labels:
        return caption_of
    names = WORLDS[source.name].attributes.get(source.label_column) if source.name in WORLDS else source.labels
    if names is None:
        pairs = set(zip(labels, captions, strict=True))
        own = len(pairs) == len(set(labels)) == len(set(captions))
        return caption_of if own else lambda row: str(row["label"])

    def named(row: Row) -> str:
        if not 0 <= row["label"] < len(names):
            raise SettingError(
                f"data.labels has {len(names)} names, but column '{source.label_column}' holds {row['label']}"
            )
        return names[row["label"]]

    return named


def caption_of(row: Row) -> str:
    return row["caption"]


def rows_of(batch: Batch) -> list[Row]:
    """Of a batch as it comes."""
    labels = [None] * len(batch.captions) if batch.labels is None else batch.labels.tolist()
    return [{"caption": caption, "label": label} for caption, label in zip(batch.captions, labels, strict=True)]
