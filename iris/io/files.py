"""Files that a reader never sees half of. No torch here: the main command uses this before torch is loaded."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)  # what a full disk, or one's share of it, is called


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, a full disk's error names ``path``: that of a write does not say where it was."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, data: bytes, durable: bool = True) -> None:
    """Write a file so that a reader sees the old or the new content, never half of one.

    ``durable``: also after a power cut, which takes the disk some milliseconds.

    Raises:
        OSError: it cannot be written; the one before it stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    """``write_atomically`` for JSON."""
    write_atomically(path, (json.dumps(value, indent=1, default=str) + "\n").encode(), durable)


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file, or None when it is missing or not readable."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None
