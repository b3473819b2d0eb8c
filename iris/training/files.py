"""Files that a reader never sees half of. No torch here: the main command uses this before torch is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old or the new content, never half of one, even after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """``write_atomically`` for JSON."""
    write_atomically(path, (json.dumps(value, indent=1, default=str) + "\n").encode())
