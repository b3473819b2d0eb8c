"""Latents of a data source encoded once and kept on disk, with the captions, labels and scores of their rows.

A cache is a folder: latents.npy [N, C, h, w], rows.jsonl (key, caption, label, score of each row), and about.json,
written last, which says what the cache was made with and has each file's size and sha256. Rows that cannot be used are
left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from iris.data.source import Source, Stream, collate
from iris.errors import SettingError, require_choice
from iris.io.files import naming, write_json
from iris.io.pixels import to_images
from iris.latents import Latent

ABOUT, ROWS, LATENTS, PROGRESS = "about.json", "rows.jsonl", "latents.npy", "progress.json"
FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HEADER = 256  # bytes before the first latent; the number of rows is only known, and written, at the end
SAVE_SECONDS = 10.0  # what a power cut can cost


class CachedLatents:
    """A folder made by ``encode_source``: ``latents[rows]``, ``captions``, ``labels``, ``scores``.

    Args:
        folder: of the cache.
        verify: also read the latents through and compare their sha256, which takes about a second per gigabyte.

    Raises:
        SettingError: no whole cache in the folder, or a damaged one.
    """

    def __init__(self, folder: Path | str, verify: bool = False) -> None:
        self.folder = Path(folder)
        self.about = _read_about(self.folder)
        self.shape, self.dtype = tuple(self.about["shape"]), DTYPES[self.about["dtype"]]
        for name, facts in self.about["files"].items():
            size = (self.folder / name).stat().st_size if (self.folder / name).exists() else -1
            if size != facts["bytes"]:
                raise self._damaged(name, "missing" if size < 0 else f"{size} bytes long instead of {facts['bytes']}")
            if (verify or name == ROWS) and _sha256(self.folder / name) != facts["sha256"]:
                raise self._damaged(name, "changed since it was written (another sha256)")
        try:
            shape = self._mapped().shape
        except (OSError, ValueError) as error:
            raise self._damaged(LATENTS, f"not a numpy file ({error})") from error
        if shape != self.shape:
            raise self._damaged(LATENTS, f"of shape {shape} instead of {self.shape}")

    def __len__(self) -> int:
        return self.shape[0]

    def latents(self, rows: Sequence[int] | Tensor | slice = slice(None)) -> Tensor:
        """Standardised latents float32 [len(rows), C, h, w], read from disk; all of them if no rows are given."""
        if not isinstance(rows, slice):
            rows = np.asarray(rows, np.int64)
        # Mapped anew each time: what a held map has touched counts as this process's memory, in the end the whole file.
        stored = torch.from_numpy(np.array(self._mapped()[rows]))
        return (stored.view(torch.bfloat16) if self.dtype == torch.bfloat16 else stored).float()

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """{"key", "caption", "label", "score"} of each row."""
        return [json.loads(line) for line in (self.folder / ROWS).read_text(encoding="utf-8").splitlines()]

    @property
    def captions(self) -> list[str]:
        return [row["caption"] for row in self.rows]

    @property
    def labels(self) -> list[int | None]:
        return [row["label"] for row in self.rows]

    @property
    def scores(self) -> list[float | None]:
        return [row["score"] for row in self.rows]

    def _mapped(self) -> np.ndarray:
        return np.load(self.folder / LATENTS, mmap_mode="r")

    def _damaged(self, name: str, problem: str) -> SettingError:
        return SettingError(f"latents {self.folder}: {name} is {problem}; delete the folder to encode anew")


def encode_source(
    latent: Latent,
    source: Source,
    folder: Path | str,
    dtype: str = "float16",
    batch: int = 64,
    report: Callable[[int], None] = lambda done: None,
) -> Path:
    """Encode every usable row of ``source`` in its own order, of a stream the first data.train of them where that is
    given; returns the cache's folder, for ``CachedLatents``.

    That folder lies in ``folder`` under the hash of the source's fingerprint, the latent's weights and the dtype, so
    that caches live side by side and the same call finds the one it made before. Killed at any point, it goes on there;
    two processes that want the same cache make it once. One that was there is read through, and its sha256 compared.

    Args:
        latent: trained; runs where its weights lie.
        source: with data.crop=centre.
        dtype: float32, float16 or bfloat16, on disk.
        batch: pictures encoded at once.
        report: called with the rows done after each batch.

    Raises:
        SettingError: unknown dtype; batch < 1; random crops; a value that is not finite, or too large for the dtype;
            more damaged rows than data.max_bad allows, or no usable one; a cache that is damaged.
    """
    require_choice("latents: dtype", dtype, tuple(DTYPES))
    if batch < 1:
        raise SettingError(f"latents: batch={batch} must be at least 1")
    if source.settings.crop != "centre":
        raise SettingError(
            f"data.crop={source.settings.crop} draws another crop each epoch, of which latents on disk "
            "would hold one; use data.crop=centre, or encode while training"
        )
    key = {"data": source.fingerprint(), "latent": latent_digest(latent), "dtype": dtype}
    if source.limit is not None:  # there are caches whose fingerprint has data.train, and that went on behind it
        key["rows"] = str(source.limit)
    place = Path(folder) / hashlib.sha256(f"{FORMAT} {sorted(key.items())}".encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / "lock"):
        there = (place / ABOUT).exists()
        if not there:
            with naming(place):
                _encode(latent, source, place, dtype, batch, report)
                _finish(place, dtype, key)
    CachedLatents(place, verify=there)  # refuses a damaged one
    return place


def latent_digest(latent: Latent) -> str:
    """sha256 (16 hex digits) of what ``latent.encode`` depends on: its class, structure, weights and statistics."""
    kind = type(latent)
    name = f"{kind.__module__}.{kind.__qualname__}"
    digest = hashlib.sha256(f"{name} {latent.channels} {latent.factor} {latent}".encode())
    for name, value in sorted(latent.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def _encode(latent: Latent, source: Source, place: Path, dtype: str, batch: int, report: Callable[[int], None]) -> None:
    """Append rows to both files, from where an earlier, killed call is known to have reached."""
    progress = _progress(place)
    device = next((value.device for value in latent.state_dict().values()), torch.device("cpu"))
    stream = source.stream(position=progress["position"], shuffle=False)
    wanted = islice(stream, None if source.limit is None else source.limit - progress["rows"])
    trained, saved, done = latent.training, time.monotonic(), progress["rows"]
    latent.eval()
    try:
        with (
            _at(place / LATENTS, progress["latent_bytes"]) as latents,
            _at(place / ROWS, progress["row_bytes"]) as rows,
        ):
            while examples := list(islice(wanted, batch)):
                values = latent.encode(to_images(torch.from_numpy(collate(examples).images)).to(device)).to("cpu")
                latents.write(_stored(values, dtype))
                rows.write("".join(_line(example) for example in examples).encode())
                done += len(examples)
                report(done)
                progress["shape"] = list(values.shape[1:])
                if time.monotonic() - saved > SAVE_SECONDS:
                    _save(place, progress | {"rows": done}, stream, latents, rows)
                    saved = time.monotonic()
            _save(place, progress | {"rows": done}, stream, latents, rows)
    finally:
        latent.train(trained)


def _stored(values: Tensor, dtype: str) -> bytes:
    stored = values.to(DTYPES[dtype]).contiguous()
    if not stored.isfinite().all():
        hint = "; use dtype=float32" if values.isfinite().all() else ""
        raise SettingError(f"latents: values are not finite in dtype={dtype}{hint}")
    return (stored.view(torch.int16) if dtype == "bfloat16" else stored).numpy().tobytes()


def _line(example: Any) -> str:
    row = {name: getattr(example, name) for name in ("key", "caption", "label", "score")}
    return json.dumps(row) + "\n"  # ASCII, so that no caption brings a line break of its own


def _progress(place: Path) -> dict[str, Any]:
    """What is known to be on the disk."""
    start = {"rows": 0, "latent_bytes": 0, "row_bytes": 0, "position": None}
    try:
        progress = json.loads((place / PROGRESS).read_text())
        held = all(
            (place / name).stat().st_size >= progress[size]
            for name, size in ((LATENTS, "latent_bytes"), (ROWS, "row_bytes"))
        )
    except (OSError, ValueError, KeyError):
        return start
    return progress if held else start


def _at(path: Path, size: int) -> BinaryIO:
    """The file open for appending behind its first ``size`` bytes; for latents room is left for a header."""
    file = open(path, "r+b" if size else "wb")
    file.truncate(size)
    file.seek(0, os.SEEK_END)
    if not size and path.name == LATENTS:
        file.write(bytes(HEADER))
    return file


def _save(place: Path, progress: dict[str, Any], stream: Stream, latents: BinaryIO, rows: BinaryIO) -> None:
    for file in (latents, rows):
        file.flush()
        os.fsync(file.fileno())
    write_json(
        place / PROGRESS,
        progress | {"latent_bytes": latents.tell(), "row_bytes": rows.tell(), "position": stream.position},
    )


def _finish(place: Path, dtype: str, key: dict[str, str]) -> None:
    """Write the header and about.json, which makes the cache a whole one."""
    progress = json.loads((place / PROGRESS).read_text())
    if not progress["rows"]:
        raise SettingError("latents: the source has no usable row")
    shape = (progress["rows"], *progress["shape"])
    kind = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2"}[dtype]  # numpy has no bfloat16: its bits
    with open(place / LATENTS, "r+b") as file:
        file.write(_header(shape, kind))
        file.flush()
        os.fsync(file.fileno())
    files = {
        name: {"bytes": (place / name).stat().st_size, "sha256": _sha256(place / name)} for name in (LATENTS, ROWS)
    }
    bad = progress["position"]["bad"]
    write_json(place / ABOUT, {"format": FORMAT, **key, "shape": shape, "bad": bad, "files": files})
    (place / PROGRESS).unlink()


def _header(shape: tuple[int, ...], kind: str) -> bytes:
    """A .npy header, version 1.0, of exactly ``HEADER`` bytes."""
    start = np.lib.format.magic(1, 0) + (HEADER - 10).to_bytes(2, "little")
    fields = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode()
    return start + fields.ljust(HEADER - len(start) - 1) + b"\n"


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / ABOUT).read_text())
    except FileNotFoundError as error:
        raise SettingError(f"latents {folder}: {ABOUT} is missing; encode_source writes it last") from error
    except (OSError, ValueError) as error:
        raise SettingError(f"latents {folder}: {ABOUT} is not readable ({error})") from error
    if {"format", "shape", "dtype", "files"} - set(about) or about["format"] != FORMAT or about["dtype"] not in DTYPES:
        raise SettingError(f"latents {folder}: {ABOUT} is not one of format {FORMAT}; delete the folder to encode anew")
    return about


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
