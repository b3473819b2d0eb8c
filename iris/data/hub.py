"""Data sets of the Hugging Face hub, or folders that ``datasets`` wrote: whole on disk, or streamed shard by shard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iris.data import sources
from iris.data.settings import SourceSettings
from iris.data.source import LOST, Raw, Source
from iris.data.table import Table, one_split
from iris.errors import SettingError
from iris.io.hub import is_hub_name, no_answer

if TYPE_CHECKING:
    import datasets

SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves in a folder
LOCAL_SHARDS = 16  # of a saved data set that is streamed
FINGERPRINT_ROWS = 8  # which are also asked of a stream at once


def open_hub(settings: SourceSettings) -> Source:
    """The data set that data.path names: a table, or with data.streaming a stream.

    Raises:
        SettingError: it cannot be had (the hub is asked once, briefly; while HF_HUB_OFFLINE is set, only its cache
            serves), or has not the split or the columns.
    """
    if settings.streaming:
        return HubStream(_streamed(settings), settings)
    wanted = {
        name: getattr(settings, name)
        for name in ("path", "image_column", "text_column", "labels", "train", "validation")
    }
    request = sources.Request(name="hub", size=None, heldout=None, seed=settings.seed, **wanted)
    splits = _read(settings)
    return Table(one_split(sources.arrange(request, splits, settings.extra), settings), settings)


class HubStream(Source):
    """Rows as the hub, or a folder, gives them.

    Raises:
        SettingError: a column is missing.
    """

    def __init__(self, rows: datasets.IterableDataset, settings: SourceSettings) -> None:
        import datasets as hf

        self.settings, self.buffer = settings, settings.buffer
        features = rows.features or rows._resolve_features().features
        columns = {"image_column": settings.image_column, "text_column": settings.text_column}
        columns |= {f"{name}_column": column for name, column in settings.extra.items()}
        for setting, column in columns.items():
            if column not in features:
                raise SettingError(
                    f"data.{setting}: {settings.path} has no column '{column}'; its columns are {', '.join(features)}"
                )
        kind = features[settings.text_column]
        self._names = kind.names if isinstance(kind, hf.ClassLabel) else settings.labels
        rows = rows.select_columns(list(dict.fromkeys(columns.values())))
        self._rows = rows.cast_column(settings.image_column, hf.Image(decode=False))
        self.shards = self._rows.num_shards

    def read(self, shard: int, offset: int = 0) -> Iterator[tuple[Raw, int]]:
        if offset == LOST:
            return
        part = self._rows.shard(self.shards, shard)
        try:
            # iter(), since iterating itself divides a data set among the workers of a torch DataLoader once more.
            for columns in (part.skip(offset) if offset else part).iter(FINGERPRINT_ROWS):
                for values in zip(*columns.values(), strict=True):
                    offset += 1
                    yield self._row(f"shard {shard} row {offset - 1}", dict(zip(columns, values, strict=True))), offset
        except Exception as error:  # a lost connection or a damaged file, in errors of whichever library read it
            yield Raw(f"shard {shard}", problem=f"not readable behind row {offset}: {error!r}"), LOST

    def content(self) -> bytes:
        digest = hashlib.sha256(f"{self.shards}".encode())
        for (raw, _), _ in zip(self.read(0), range(FINGERPRINT_ROWS), strict=False):
            digest.update(repr((raw.caption, raw.label, raw.score)).encode() + ((raw.image or {}).get("bytes") or b""))
        return digest.digest()

    def _row(self, key: str, row: dict[str, Any]) -> Raw:
        numbers = {name: row[column] for name, column in self.settings.extra.items()}
        text = row[self.settings.text_column]
        if isinstance(text, int) and self._names is not None and 0 <= text < len(self._names):
            text = self._names[text]
        try:
            label = int(numbers["label"]) if "label" in numbers else None
            score = float(numbers["score"]) if numbers.get("score") is not None else None
        except (TypeError, ValueError) as error:
            return Raw(key, problem=f"unreadable: {error}")
        return Raw(key, row[self.settings.image_column], text if text is None else str(text), label, score)


def _read(settings: SourceSettings) -> dict[str, datasets.Dataset]:
    """Every split, on disk."""
    import datasets as hf

    folder = Path(settings.path).expanduser()
    if any((folder / name).exists() for name in SAVED):
        saved = hf.load_from_disk(str(folder))
        return dict(saved) if isinstance(saved, hf.DatasetDict) else {"train": saved}
    return dict(_load(settings))


def _streamed(settings: SourceSettings) -> datasets.IterableDataset:
    folder = Path(settings.path).expanduser()
    if any((folder / name).exists() for name in SAVED):
        rows = one_split(_read(settings), settings)
        return rows.to_iterable_dataset(num_shards=max(1, min(LOCAL_SHARDS, len(rows))))
    return one_split(_load(settings, streaming=True), settings)


def _load(settings: SourceSettings, **options: Any) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """``datasets.load_dataset``, with quick and clear errors."""
    import datasets as hf
    from huggingface_hub import constants

    path, offline = settings.path, constants.HF_HUB_OFFLINE
    local = Path(path).expanduser().is_dir()
    if not local:
        if not is_hub_name(path):
            raise SettingError(f"data.path={path!r} is neither a folder nor the name of a data set on the hub")
        # One question without retries; datasets' own go on for about a minute.
        if not offline and (problem := no_answer(path, settings.revision, kind="dataset")):
            raise SettingError(
                f"data.path={path!r}: no such folder, and the hub gave {problem!r}; a copy in HF's "
                "cache is used while HF_HUB_OFFLINE=1 is set"
            ) from problem
    try:
        with sources._quiet():
            return hf.load_dataset(
                str(Path(path).expanduser()) if local else path, settings.config, revision=settings.revision, **options
            )
    except Exception as error:  # HF wraps errors in its own kinds, several deep
        why = "not in HF's cache, and HF_HUB_OFFLINE forbids a download" if offline and not local else "cannot be read"
        raise SettingError(f"data.path={path!r}: {why} ({error.__cause__ or error})") from error
