"""Arrays on disk that are written row by row, and can be continued after a kill."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from iris.errors import SettingError


class GrowingArray:
    """A .npy file whose final shape is known and whose rows are appended.

    Written with plain file calls: a full disk is an OSError then, where a mapped file would kill the process.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str) -> None:
        self.path, self.dtype, self.rows = path, np.dtype(dtype), 0
        self._row_bytes = self.dtype.itemsize * int(np.prod(shape[1:]))
        header = io.BytesIO()
        fields = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, fields)
        self._header = header.getvalue()

    def holds(self, rows: int) -> bool:
        """Whether the file on disk has at least the first ``rows`` rows of this array."""
        if not self.path.exists() or self.path.stat().st_size < self._end(rows):
            return False
        with open(self.path, "rb") as file:
            return file.read(len(self._header)) == self._header

    def continue_at(self, rows: int) -> None:
        """Keep the first ``rows`` rows, drop the rest."""
        with open(self.path, "r+b" if rows else "wb") as file:
            if not rows:
                file.write(self._header)
            file.truncate(self._end(rows))
        self.rows = rows

    def append(self, values: Tensor) -> None:
        """Add values [B, ...], which must be finite in the file's dtype."""
        array = values.detach().to("cpu", getattr(torch, self.dtype.name)).contiguous().numpy()
        if not np.isfinite(array).all():
            hint = "; use dtype=float32" if values.isfinite().all() else ""
            raise SettingError(
                f"text embeddings: values of {self.path.stem} are not finite in dtype={self.dtype.name}{hint}"
            )
        with open(self.path, "ab") as file:
            file.write(array.tobytes())
        self.rows += len(array)

    def sync(self) -> None:
        """Return when the rows are on the disk."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())

    def _end(self, rows: int) -> int:
        return len(self._header) + rows * self._row_bytes
