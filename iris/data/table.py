"""Sources whose rows are numbered: drawn worlds, parquet files, folders, and data sets of the hub that lie on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iris.data import sources
from iris.data.decode import NAMED
from iris.data.settings import SourceSettings
from iris.data.sidecar import captioned_files, has_metadata
from iris.data.source import Batch, Example, Raw, Source, collate
from iris.errors import SettingError

if TYPE_CHECKING:
    import datasets

FINGERPRINT_ROWS = 64  # rows whose pictures the fingerprint reads


class Table(Source):
    """Rows of an HF data set: ``batch(numbers)``, and the stream, in which each row is a shard of its own.

    Args:
        rows: columns image and caption; label and score where the settings name them.
        settings: of the source.
        files: what is known of the files' contents; empty takes a sample of the rows instead.

    Raises:
        SettingError: labels or scores are not numbers, or no row reaches data.min_score.
    """

    buffer = 1
    limit = None  # data.train has chosen these rows

    def __init__(self, rows: datasets.Dataset, settings: SourceSettings, files: bytes = b"") -> None:
        import datasets as hf

        self.settings, self._files = settings, files
        kept = _selected(rows, settings)
        self._rows = rows.select(kept).cast_column("image", hf.Image(decode=False))
        self.shards = len(self._rows)
        self.bad: dict[int, str] = {}
        self._labels, self._scores = (_numbers(self._rows, settings, name) for name in ("label", "score"))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def captions(self) -> list[str]:
        """Of every row, without reading a picture; those of damaged rows too."""
        return [(text or "").strip() for text in self._rows["caption"]]

    @property
    def texts(self) -> list[dict[str, Any]]:
        """{"caption", "label"} of every row, without reading a picture."""
        labels = [None] * len(self) if self._labels is None else self._labels.tolist()
        return [{"caption": caption, "label": label} for caption, label in zip(self.captions, labels, strict=True)]

    def batch(self, indices: Sequence[int], seed: int = 0, epoch: int = 0) -> Batch:
        """Rows by number, 0 <= i < len(self). In a damaged row's place stands the next usable one; ``bad`` names it.

        Raises:
            SettingError: more damaged rows than data.max_bad allows; a number out of range.
        """
        indices = [int(i) for i in indices]
        if any(not 0 <= i < len(self) for i in indices):
            raise SettingError(f"data: rows are numbered 0..{len(self) - 1}, asked for {min(indices)}..{max(indices)}")
        return collate([self._usable(i, raw, seed, epoch) for i, raw in zip(indices, self._raw(indices), strict=True)])

    def read(self, shard: int, offset: int = 0) -> Iterator[tuple[Raw, int]]:
        if offset == 0:
            yield self._raw([shard])[0], 1

    def content(self) -> bytes:
        return self._files or _sample(self._rows)

    def _raw(self, indices: list[int]) -> list[Raw]:
        got = self._rows[indices]
        label = lambda i: None if self._labels is None else int(self._labels[i])  # noqa: E731
        score = lambda i: None if self._scores is None else float(self._scores[i])  # noqa: E731
        return [
            Raw(_key(row, cell), cell, caption, label(i), score(i))
            for i, cell, caption, row in zip(indices, got["image"], got["caption"], got["row"], strict=True)
        ]

    def _usable(self, index: int, raw: Raw, seed: int, epoch: int) -> Example:
        for _ in range(len(self)):
            example = self.decode(raw, seed, epoch)
            if isinstance(example, Example):
                return example
            self._count(index, f"{raw.key} ({example})")
            index = (index + 1) % len(self)
            raw = self._raw([index])[0]
        raise SettingError(f"data: none of the {len(self)} rows can be used: {', '.join([*self.bad.values()][:NAMED])}")

    def _count(self, index: int, name: str) -> None:
        self.bad[index] = name
        if len(self.bad) > self.settings.max_bad * len(self):
            named = ", ".join([*self.bad.values()][:NAMED]) + (", …" if len(self.bad) > NAMED else "")
            raise SettingError(
                f"data.max_bad allows {self.settings.max_bad:.2%} unusable rows, but at least "
                f"{len(self.bad)} of {len(self)} are: {named}"
            )


def open_table(settings: SourceSettings) -> Table:
    """A drawn world, parquet files or a folder of images with metadata or with a .txt beside each image.

    Raises:
        SettingError: as ``iris.data.load``; a split that there is not.
    """
    wanted = {
        name: getattr(settings, name)
        for name in ("path", "image_column", "text_column", "labels", "train", "validation", "heldout", "seed")
    }
    if settings.name in sources.WORLDS:
        counts = {split: getattr(settings, split) if split == settings.split else 0 for split in sources.WORLD_COUNTS}
        splits = sources.load(settings.name, **wanted | {"size": settings.size} | counts)
        for name, column in settings.extra.items():  # the world's attributes are columns already
            splits = _copied(splits, f"data.{name}_column", column, name)
        files = sources.fingerprint(settings.name, **wanted | {"size": settings.size} | counts).encode()
        rows = one_split(splits, settings)
        size = settings.size or sources.WORLDS[settings.name].size
        return Table(rows, SourceSettings(**vars(settings) | {"size": size}), files)
    request = sources._request(settings.name, **wanted)
    files = sources.fingerprint(settings.name, **wanted).encode()
    if settings.name == "folder" and not has_metadata(Path(settings.path)):
        splits = sources.arrange(request, captioned_files(Path(settings.path), settings.text_column), settings.extra)
    else:
        splits = sources.SOURCES[settings.name](request, settings.extra)
    return Table(one_split(splits, settings), settings, files)


def one_split(splits: Mapping[str, Any], settings: SourceSettings) -> Any:
    """The split that data.split names."""
    if settings.split not in splits:
        raise SettingError(
            f"data.split must be one of {', '.join(splits)} for {settings.path or settings.name}, "
            f"not '{settings.split}'"
        )
    return splits[settings.split]


def _key(row: int, cell: dict[str, Any] | None) -> str:
    """Names a row for people; without folders, since the place of files must not decide about random crops."""
    return f"row {row} {Path((cell or {}).get('path') or '').name}".strip()


def _copied(splits: datasets.DatasetDict, setting: str, column: str, name: str) -> datasets.DatasetDict:
    if column not in splits["train"].column_names:
        raise SettingError(
            f"{setting}: there is no column '{column}'; the columns are {', '.join(splits['train'].column_names)}"
        )
    for split, part in splits.items():
        splits[split] = part.add_column(name, list(part[column]), feature=part.features[column])
    return splits


def _selected(rows: datasets.Dataset, settings: SourceSettings) -> np.ndarray:
    """Numbers of the rows whose score is high enough."""
    if settings.min_score is None:
        return np.arange(len(rows))
    scores = _numbers(rows, settings, "score")
    kept = np.flatnonzero(scores >= settings.min_score)  # False for rows without a score, which are NaN
    if not len(kept):
        highest = np.nanmax(scores, initial=-np.inf)
        raise SettingError(
            f"data.min_score={settings.min_score}: no row of {settings.path or settings.name} reaches "
            f"it; column '{settings.score_column}' goes up to {highest}"
        )
    return kept


def _numbers(rows: datasets.Dataset, settings: SourceSettings, name: str) -> np.ndarray | None:
    """The label column as int64 [N] or the score column as float64 [N]; None if the settings name none."""
    if name not in settings.extra:
        return None
    column, kind = settings.extra[name], str(getattr(rows.features[name], "dtype", ""))
    integers, reals = ("int", "uint"), ("float", "double")
    allowed, dtype = (integers, np.int64) if name == "label" else (integers + reals, np.float64)
    if not kind.startswith(allowed):
        raise SettingError(f"data.{name}_column: column '{column}' holds {rows.features[name]}, not numbers")
    values = rows[name]
    if name == "label" and None in values:
        raise SettingError(f"data.label_column: column '{column}' has rows without a label")
    return np.asarray([np.nan if value is None else value for value in values], dtype)


def _sample(rows: datasets.Dataset) -> bytes:
    """sha256 of every caption, and of the pictures of 64 evenly spaced rows."""
    digest = hashlib.sha256(repr(list(rows["caption"])).encode())
    for i in np.unique(np.linspace(0, len(rows) - 1, FINGERPRINT_ROWS).astype(int)) if len(rows) else ():
        cell = rows[int(i)]["image"] or {}
        digest.update(cell.get("bytes") or (Path(cell["path"]).read_bytes() if cell.get("path") else b""))
    return digest.digest()
