"""The settings of a data source, and the ready ones of known data sets (``conf/*.yaml``)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from iris.data.decode import SMALLEST
from iris.errors import SettingError, require_choice
from iris.settings import setting

DRAWN = ("shapes", "shapes2")
KINDS = (*DRAWN, "parquet", "folder", "hub", "tar")
FILES_SIZE = 32  # of pictures from files, where data.size does not say: that of the embedded default
CROPS = ("centre", "random")
FOLDER = Path(__file__).with_name("conf")
READY = tuple(sorted(file.stem for file in FOLDER.glob("*.yaml")))


@dataclass(frozen=True)
class SourceSettings:
    """What ``open_source`` takes; None leaves a choice to the source.

    Attributes:
        name: kind of source.
        path: parquet: a file, folder or glob; folder: a folder; tar: a folder, or a pattern of shards with * or
            {000..123}; hub: a name (owner/name), or a folder that ``datasets`` wrote.
        config, revision: of a data set on the hub.
        split: train, validation, or for drawn worlds heldout. Shards are one split: the path says which.
        streaming: read a data set of the hub as it comes, without a copy on disk.
        size: side of the pictures in pixels; None: a drawn world's own, and 32 for files.
        crop: of what does not fit a square: centre, or random (anew in each epoch).
        image_column, text_column: of a tar, endings of member files ("jpg;png": the first there is), or fields of the
            example's .json ("caption", "a.b").
        label_column, score_column: further columns with class numbers and with numbers to select by.
        min_score: only rows whose score is at least this.
        labels: names of the classes, when the text column holds bare integers.
        train, validation, heldout, seed: as of ``iris.data.load``.
        buffer: rows of a stream that are shuffled among each other; takes their encoded size in memory.
        max_bad: share of damaged rows that is tolerated.
    """

    name: str
    path: str | None = None
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    streaming: bool = False
    size: int | None = None
    crop: str = "centre"
    image_column: str = "image"
    text_column: str = "text"
    label_column: str | None = None
    score_column: str | None = None
    min_score: float | None = None
    labels: tuple[str, ...] | None = None
    train: int | None = None
    validation: int | float | None = None
    heldout: int | None = None
    seed: int = 0
    buffer: int = 1000
    max_bad: float = 0.01

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise SettingError(f"data must be one of {', '.join((*KINDS, *READY))}, not '{self.name}'")
        require_choice("data.crop", self.crop, CROPS)
        if self.size is None and self.name not in DRAWN:
            object.__setattr__(self, "size", FILES_SIZE)
        if self.size is not None and self.size < SMALLEST:
            raise SettingError(f"data.size must be >= {SMALLEST} pixels, not {self.size}")
        if not 0.0 <= self.max_bad < 1.0:
            raise SettingError(f"data.max_bad must be a share in [0, 1), not {self.max_bad}")
        if self.buffer < 1:
            raise SettingError(f"data.buffer must be >= 1 rows, not {self.buffer}")
        if self.min_score is not None and self.score_column is None:
            raise SettingError("data.min_score needs data.score_column, the column that holds the scores")
        if self.path is None and self.name not in DRAWN:
            raise SettingError(f"data.path is needed with data={self.name}: what to read")

    @property
    def extra(self) -> dict[str, str]:
        """Columns beyond image and caption: name here -> name in the files."""
        wanted = {"label": self.label_column, "score": self.score_column}
        return {name: column for name, column in wanted.items() if column is not None}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Settings data.*: captioned images; null leaves a choice to the source. See ``SourceSettings``.

    The source is known by what it holds, not by where it lies (``Source.fingerprint``), so that no key is made of these.
    """

    name: str = setting("shapes", "the source", choices=(*KINDS, *READY))
    path: str | None = setting(
        None, "parquet: file, folder or glob; folder: a folder; tar: folder or pattern; hub: name"
    )
    config: str | None = setting(None, "of a data set on the hub")
    revision: str | None = setting(None, "of a data set on the hub")
    streaming: bool | None = setting(None, "read a data set of the hub as it comes")
    size: int | None = setting(None, "side of the pictures in pixels; null: the source's own, 32 for files", low=8)
    crop: str | None = setting(None, "of what fits no square: centre, random; null: centre")
    image_column: str | None = setting(None, "name in the files; null: image")
    text_column: str | None = setting(None, "name in the files; null: text")
    label_column: str | None = setting(None, "class numbers")
    score_column: str | None = setting(None, "numbers to select rows by")
    min_score: float | None = setting(None, "only rows whose score is at least this")
    labels: list | None = setting(None, "names of the classes")
    train: int | None = setting(None, "rows to train on; null: all, 16,384 drawn ones", low=1)
    validation: int | float | None = setting(None, "rows, or a share; null: a tenth, 4,096 drawn ones", low=0)
    heldout: int | None = setting(
        None, "pictures of combinations that training never shows; null: 1,024 drawn ones", low=0
    )
    seed: int | None = setting(None, "of a drawn world")
    buffer: int | None = setting(None, "rows of a stream that are shuffled among each other", low=1)
    max_bad: float | None = setting(None, "share of damaged rows that is tolerated", low=0, high=0.99)
    live: bool = setting(
        False, "read, crop and encode pictures in each step instead of encoding all of them to disk first"
    )
    workers: int = setting(0, "of live: processes that read and decode beside each one that trains", low=0)

    def source(self, split: str) -> SourceSettings:
        """The settings of one split.

        Raises:
            SettingError: a value that cannot be used; random crops of what is stored, of which a store would hold one.
        """
        given = {name: value for name, value in vars(self).items() if name not in ("name", "live", "workers")}
        chosen = source_settings(self.name, split=split, **given)
        if chosen.crop != "centre" and not self.live:
            raise SettingError(
                f"data.crop={chosen.crop}: stages store their pictures and latents once; allowed: centre, or "
                "data.live=true in stages class, text and aesthetic"
            )
        return chosen


# data=NAME, for every source that there is.
DATA_OPTIONS: dict[str, dict[str, Any]] = {name: {"name": name} for name in (*KINDS, *READY)}


def source_settings(name: str, **given: Any) -> SourceSettings:
    """The settings of a source: those of the ready data set ``name``, if it is one, under the ``given`` ones.

    A ready data set's ``local`` part holds when ``path`` names something on this machine. Values of None count as not
    given.

    Raises:
        SettingError: no such source or setting, or a value that cannot be used.
    """
    known = [field.name for field in fields(SourceSettings)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise SettingError(f"data.{unknown[0]} is no setting; there are {', '.join(known[1:])}")
    given = {key: value for key, value in given.items() if value is not None}
    if "path" in given:
        given["path"] = str(given["path"])
    chosen: dict[str, Any] = {"name": name}
    if name in READY:
        ready = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        local = ready.pop("local", {})
        chosen = ready | (local if "path" in given and is_local(given["path"]) else {})
    chosen |= given
    if chosen.get("labels") is not None:
        chosen["labels"] = tuple(chosen["labels"])
    return SourceSettings(**chosen)


def is_local(path: str) -> bool:
    """Whether a path is, or can only be, one of this machine's, and no name on the hub."""
    return Path(path).expanduser().exists() or path.startswith(("/", "~", ".")) or any(sign in path for sign in "*?[{")
