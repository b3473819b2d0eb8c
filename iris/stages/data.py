"""A stage's pictures, captions and classes: opened, identified, stored once, and read by the row."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from iris.data import WORLDS, SourceSettings, open_source
from iris.data import fingerprint as world_fingerprint
from iris.data import settings as source_settings
from iris.data.source import Batch, Source
from iris.data.table import Table
from iris.errors import SettingError
from iris.io.files import naming, write_json
from iris.io.hashing import digest
from iris.stages.latent_cache import CachedLatents
from iris.stages.settings import Data

ABOUT, PIXELS = "about.json", "pixels.bin"
CHUNK = 256  # rows decoded at once
WORLD_CLASS = "shape"  # the attribute that is a drawn picture's class, unless data.label_column names another

Row = dict[str, Any]  # "caption", "label", and what else is known of it


def described(data: Data, split: str) -> SourceSettings:
    """The settings of one split.

    Raises:
        SettingError: a value that cannot be used; random crops, of which a store would hold one each.
    """
    given = {name: value for name, value in asdict(data).items() if name not in ("name", "live", "workers")}
    chosen = source_settings(data.name, split=split, **given)
    if chosen.crop != "centre" and not data.live:
        raise SettingError(
            f"data.crop={chosen.crop}: stages store their pictures and latents once; allowed: centre, or "
            "data.live=true in stages class, text and aesthetic"
        )
    return chosen


def check_stored(data: Data, stage: str) -> None:
    """Raise a SettingError if ``data`` is to be read live, which ``stage`` cannot."""
    if data.live:
        raise SettingError(
            f"data.live=true: stage={stage} trains on what is stored; allowed: false (stages class, text "
            "and aesthetic may read live)"
        )


def with_classes(data: Data) -> Data:
    """The same rows with their class numbers, where a drawn world has them."""
    drawn = data.name in WORLDS and data.label_column is None
    return replace(data, label_column=WORLD_CLASS) if drawn else data


def opened(chosen: SourceSettings) -> Source:
    """The source of these settings."""
    given = {name: value for name, value in vars(chosen).items() if name != "name"}
    return open_source(chosen.name, **given)


def held_out(data: Data) -> SourceSettings | None:
    """The validation split, where there is one: not of streams, nor when data.validation is 0."""
    chosen = described(data, "validation")
    return None if streamed(chosen) or data.validation == 0 else chosen


def streamed(chosen: SourceSettings) -> bool:
    """Whether its rows come one after the other, their number unknown."""
    return chosen.name == "tar" or (chosen.name == "hub" and chosen.streaming)


def fingerprint(chosen: SourceSettings) -> str:
    """16 hex digits of what determines a source's examples; of a drawn world without drawing it."""
    if chosen.name not in WORLDS:
        return opened(chosen).fingerprint()
    counts = {name: getattr(chosen, name) for name in ("train", "validation", "heldout")}
    counts = {name: count if name == chosen.split else 0 for name, count in counts.items()}
    world = world_fingerprint(chosen.name, size=chosen.size, seed=chosen.seed, **counts)
    return digest([world, chosen.split, chosen.label_column, chosen.score_column, chosen.min_score])


def size_of(chosen: SourceSettings) -> int:
    """Side of the pictures in pixels."""
    return chosen.size or WORLDS[chosen.name].size


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


def store_pixels(chosen: SourceSettings, folder: Path, report: Callable[[int, int | None], None]) -> None:
    """Decode every usable row once, in the source's order; at most data.train of a stream.

    Args:
        folder: of the result, for ``Pixels``; what is there whole is read through, and stays.
        report: called with the rows done, and how many there are where that is known.

    Raises:
        SettingError: a stream without data.train; no usable row, or too many damaged ones; a damaged store.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if (folder / ABOUT).exists():
            _check_pixels(folder)
            return
        source = opened(chosen)
        total = len(source) if isinstance(source, Table) else source.limit
        if total is None:
            each = f"{chosen.size**2 * 3 / 1000:.0f} kB"
            raise SettingError(
                f"data.train is needed with data={chosen.name}: how many rows of {chosen.path} to store at {each} each"
            )
        stream, done, sha256 = islice(source.stream(shuffle=False), total), 0, hashlib.sha256()
        with naming(folder / PIXELS), open(folder / PIXELS, "wb") as file:
            while examples := list(islice(stream, CHUNK)):
                images = np.stack([example.image for example in examples]).tobytes()
                file.write(images)
                sha256.update(images)
                done += len(examples)
                report(done, total)
            file.flush()
            os.fsync(file.fileno())
        if not done:
            raise SettingError(f"data={chosen.name}: there is no usable row")
        write_json(folder / ABOUT, {"shape": [done, *examples_shape(chosen)], "sha256": sha256.hexdigest()})


def _check_pixels(folder: Path) -> None:
    """Raise a SettingError unless the pictures are those that were stored."""
    about, path = json.loads((folder / ABOUT).read_text()), folder / PIXELS
    expected, size = int(np.prod(about["shape"])), path.stat().st_size if path.exists() else -1
    problem = None
    if size != expected:
        problem = "missing" if size < 0 else f"{size} bytes long instead of {expected}"
    elif "sha256" in about:  # stores of earlier versions have none
        with open(path, "rb") as file:
            changed = hashlib.file_digest(file, "sha256").hexdigest() != about["sha256"]
        problem = "changed since it was written (another sha256)" if changed else None
    if problem is not None:
        raise SettingError(f"pictures {folder}: {PIXELS} is {problem}; delete the folder to store them anew")


def examples_shape(chosen: SourceSettings) -> tuple[int, int, int]:
    """Of one picture."""
    return (size_of(chosen), size_of(chosen), 3)


class Latents:
    """Cached latents as a task reads them: ``latents[rows]`` float32 [len(rows), C, h, w]."""

    def __init__(self, cache: CachedLatents) -> None:
        self._cache, self.shape = cache, cache.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        return self._cache.latents(rows)

    def keys(self, rows: Sequence[int]) -> list[str]:
        """Where the rows came from, for messages."""
        return [self._cache.rows[row]["key"] for row in rows]


def class_names(rows: Sequence[Row], chosen: SourceSettings) -> list[str]:
    """The class of each row: the name of its label where names are known, its caption where there are no labels.

    Labels without names keep their captions if each label has one of its own, and else are named by their numbers.
    """
    name = class_namer(rows, chosen)
    return [name(row) for row in rows]


def class_namer(rows: Sequence[Row], chosen: SourceSettings) -> Callable[[Row], str]:
    """The class of a row, as ``class_names`` of ``rows`` has it; other rows may follow."""
    captions, labels = [row["caption"] for row in rows], [row["label"] for row in rows]
    if None in labels:
        return caption_of
    names = WORLDS[chosen.name].attributes.get(chosen.label_column) if chosen.name in WORLDS else chosen.labels
    if names is None:
        pairs = set(zip(labels, captions, strict=True))
        own = len(pairs) == len(set(labels)) == len(set(captions))
        return caption_of if own else lambda row: str(row["label"])

    def named(row: Row) -> str:
        if not 0 <= row["label"] < len(names):
            raise SettingError(
                f"data.labels has {len(names)} names, but column '{chosen.label_column}' holds {row['label']}"
            )
        return names[row["label"]]

    return named


def caption_of(row: Row) -> str:
    return row["caption"]


def rows_of(batch: Batch) -> list[Row]:
    """Of a batch as it comes."""
    labels = [None] * len(batch.captions) if batch.labels is None else batch.labels.tolist()
    return [{"caption": caption, "label": label} for caption, label in zip(batch.captions, labels, strict=True)]
