"""Files that a reader never sees half of. No torch here: the main command uses this before torch is loaded."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: bytes, durable: bool = True) -> None:
    """Write a file so that a reader sees the old or the new content, never half of one.

    ``durable``: also after a power cut, which takes the disk some milliseconds.

    Raises:
        OSError: it cannot be written; the one before it stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
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
