"""The settings of a data source, and the ready ones of known data sets (``conf/*.yaml``)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from iris.data.decode import SMALLEST
from iris.errors import SettingError, require_choice

KINDS = ("shapes", "shapes2", "parquet", "folder", "hub", "tar")
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
        size: side of the pictures in pixels; None only for drawn worlds.
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
        if self.size is None and self.name not in ("shapes", "shapes2"):
            raise SettingError(f"data.size is needed with data={self.name}: the pictures' side in pixels")
        if self.size is not None and self.size < SMALLEST:
            raise SettingError(f"data.size must be >= {SMALLEST} pixels, not {self.size}")
        if not 0.0 <= self.max_bad < 1.0:
            raise SettingError(f"data.max_bad must be a share in [0, 1), not {self.max_bad}")
        if self.buffer < 1:
            raise SettingError(f"data.buffer must be >= 1 rows, not {self.buffer}")
        if self.min_score is not None and self.score_column is None:
            raise SettingError("data.min_score needs data.score_column, the column that holds the scores")
        if self.path is None and self.name not in ("shapes", "shapes2"):
            raise SettingError(f"data.path is needed with data={self.name}: what to read")

    @property
    def extra(self) -> dict[str, str]:
        """Columns beyond image and caption: name here -> name in the files."""
        wanted = {"label": self.label_column, "score": self.score_column}
        return {name: column for name, column in wanted.items() if column is not None}


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
