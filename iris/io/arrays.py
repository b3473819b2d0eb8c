"""Folders of arrays that are written row by row, continued after a kill, and never changed once they are whole.

Such a folder holds .npy files, files of lines, and about.json, written last: what it was made with, and each file's
size and sha256. While it grows, progress.json says how many rows are known to be on the disk.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from iris.errors import SettingError
from iris.io.files import naming, read_json, write_json
from iris.io.hashing import file_sha256
from iris.io.tensors import DTYPES

ABOUT, PROGRESS, LOCK = "about.json", "progress.json", "lock"
HEADER = 256  # bytes before the first row; the number of rows is only known, and written, at the end
SAVE_SECONDS = 10.0  # what a power cut can cost


@dataclass(frozen=True)
class ArrayFolder:
    """One such folder, of a kind that the other fields describe.

    Attributes:
        path: the folder.
        content: what errors call it, such as "text embeddings".
        verb: what its maker does, "embed".
        maker: the function that makes it.
        format: of about.json; the folder is refused if it has another.
        keys: what about.json has beside "format", "dtype" and "files".
    """

    path: Path
    content: str
    verb: str
    maker: str
    format: int
    keys: frozenset[str]

    def open(self, small: str, verify: bool) -> dict[str, Any]:
        """What about.json says, once the sizes of all files and the sha256 of ``small`` are found to be what it says.

        With ``verify`` the sha256 of all files, which takes about a second per gigabyte.

        Raises:
            SettingError: the folder is not whole, of another format, or a file is not what was written.
        """
        about = self._about()
        for name, facts in about["files"].items():
            path = self.path / name
            size = path.stat().st_size if path.exists() else -1
            if size != facts["bytes"]:
                raise self._damaged(name, "missing" if size < 0 else f"{size} bytes long instead of {facts['bytes']}")
            if (verify or name == small) and file_sha256(path) != facts["sha256"]:
                raise self._damaged(name, "changed since it was written (another sha256)")
        return about

    def check_array(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Raise a SettingError unless the header of ``name`` says this shape and dtype."""
        try:
            array = np.load(self.path / name, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise self._damaged(name, f"not a numpy file ({error})") from error
        if array.shape != shape or array.dtype != _stored(dtype):
            raise self._damaged(name, f"{array.dtype} {array.shape} instead of {_stored(dtype)} {shape}")

    def read(self, name: str, rows: np.ndarray | slice) -> Tensor:
        """Rows of the array ``name``, read from disk; those of bfloat16 as int16."""
        # Mapped anew each time: what a held map has touched counts as this process's memory, in the end the whole file.
        return torch.from_numpy(np.array(np.load(self.path / name, mmap_mode="r")[rows]))

    def make(self, write: Callable[[], None]) -> bool:
        """Call ``write``, which ends with ``Growth.finish``, unless the folder is whole; returns whether it was.

        Two processes that want the same folder make it once.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path / LOCK):
            whole = (self.path / ABOUT).exists()
            if not whole:
                with naming(self.path):
                    write()
        return whole

    def _about(self) -> dict[str, Any]:
        try:
            about = json.loads((self.path / ABOUT).read_text())
        except FileNotFoundError as error:
            raise self._error(f"{ABOUT} is missing; {self.maker} writes it last") from error
        except (OSError, ValueError) as error:
            raise self._error(f"{ABOUT} is not readable ({error})") from error
        keys = {"format", "dtype", "files", *self.keys}
        if not isinstance(about, dict) or keys - set(about) or about["format"] != self.format:
            raise self._damaged(ABOUT, f"not one of format {self.format}")
        return about

    def _error(self, problem: str) -> SettingError:
        return SettingError(f"{self.content} {self.path}: {problem}")

    def _damaged(self, name: str, problem: str) -> SettingError:
        return self._error(f"{name} is {problem}; delete the folder to {self.verb} anew")


class GrowingArray:
    """A .npy file to which rows of shape ``row`` are appended, in ``dtype``: a key of ``DTYPES``, or bool.

    Written with plain file calls: a full disk is an OSError then, where a mapped file would kill the process.
    """

    def __init__(self, folder: ArrayFolder, name: str, row: tuple[int, ...], dtype: str) -> None:
        self.path, self.content, self.row, self.dtype = folder.path / name, folder.content, row, dtype
        self._row_bytes = _stored(dtype).itemsize * int(np.prod(row))

    def append(self, values: Tensor) -> None:
        """Add values [B, *row].

        Raises:
            SettingError: one that is not finite in the file's dtype.
            ValueError: another shape.
        """
        if values.shape[1:] != self.row:
            raise ValueError(f"{self.path.name} has rows of shape {self.row}, not {tuple(values.shape[1:])}")
        stored = values.detach().to("cpu", DTYPES.get(self.dtype, torch.bool)).contiguous()
        if not stored.isfinite().all():
            hint = "; use dtype=float32" if values.isfinite().all() else ""
            raise SettingError(f"{self.content}: values of {self.path.stem} are not finite in dtype={self.dtype}{hint}")
        with open(self.path, "ab") as file:
            file.write((stored.view(torch.int16) if self.dtype == "bfloat16" else stored).numpy().tobytes())

    def end_of(self, rows: int) -> int | None:
        """Bytes of the file up to row ``rows``; None if it has not so many."""
        end = HEADER + rows * self._row_bytes
        if self.path.stat().st_size < end:
            return None
        with open(self.path, "rb") as file:
            return end if file.read(HEADER) in (bytes(HEADER), self._header(rows)) else None

    def start(self) -> None:
        self.path.write_bytes(bytes(HEADER))

    def close(self, rows: int) -> None:
        """Write the header."""
        with open(self.path, "r+b") as file:
            file.write(self._header(rows))

    def _header(self, rows: int) -> bytes:
        """A .npy header, version 1.0, of exactly ``HEADER`` bytes."""
        start = np.lib.format.magic(1, 0) + (HEADER - 10).to_bytes(2, "little")
        descr = np.lib.format.dtype_to_descr(_stored(self.dtype))
        fields = repr({"descr": descr, "fortran_order": False, "shape": (rows, *self.row)}).encode()
        return start + fields.ljust(HEADER - len(start) - 1) + b"\n"


class GrowingLines:
    """A text file to which a line for each row is appended; the lines end with "\\n" and hold no other."""

    def __init__(self, folder: ArrayFolder, name: str) -> None:
        self.path = folder.path / name

    def append(self, lines: Sequence[str]) -> None:
        with open(self.path, "ab") as file:
            file.write("".join(lines).encode())

    def end_of(self, rows: int) -> int | None:
        """As of ``GrowingArray``."""
        with open(self.path, "rb") as file:
            lines = [len(line) for line in islice(file, rows) if line.endswith(b"\n")]
        return sum(lines) if len(lines) == rows else None

    def start(self) -> None:
        self.path.write_bytes(b"")

    def close(self, rows: int) -> None:
        """Nothing is left to write."""


class Growth:
    """Files of a folder that grow together, from the last row on that is known to be on the disk.

    ``progress`` has "rows", 0 at the start, and what ``append`` was told beside the last of them.
    """

    def __init__(self, folder: ArrayFolder, files: Sequence[GrowingArray | GrowingLines]) -> None:
        self.folder, self.files, self._saved = folder, files, time.monotonic()
        self.progress = read_json(folder.path / PROGRESS) or {}
        try:
            ends = [file.end_of(self.progress["rows"]) for file in files]
        except (OSError, KeyError):
            ends = [None]
        if None in ends:
            self.progress = {"rows": 0}
            for file in files:
                file.start()
        else:
            for file, end in zip(files, ends, strict=True):
                os.truncate(file.path, end)

    def append(self, *values: Any, **told: Any) -> None:
        """Add rows to each file, in the order of ``files``; ``told`` is found again with them."""
        for file, value in zip(self.files, values, strict=True):
            file.append(value)
        self.progress |= {"rows": self.progress["rows"] + len(values[0]), **told}

    def save(self, every: float = 0.0) -> None:
        """Return when all rows so far will be found again; nothing is done if that is less than ``every`` seconds ago."""
        if time.monotonic() - self._saved < every:
            return
        for file in self.files:
            _sync(file.path)
        write_json(self.folder.path / PROGRESS, self.progress)
        self._saved = time.monotonic()

    def finish(self, about: dict[str, Any], *others: str) -> None:
        """End the files and write about.json, which makes the folder, with ``others`` among its files, a whole one."""
        self.save()
        for file in self.files:
            file.close(self.progress["rows"])
            _sync(file.path)
        paths = [*(file.path for file in self.files), *(self.folder.path / name for name in others)]
        files = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths}
        write_json(self.folder.path / ABOUT, {"format": self.folder.format, **about, "files": files})
        (self.folder.path / PROGRESS).unlink()


def _stored(dtype: str) -> np.dtype:
    """The dtype on disk; numpy has no bfloat16, so that its bits are kept."""
    return np.dtype("int16" if dtype == "bfloat16" else dtype)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
