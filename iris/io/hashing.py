"""Short names of values, and digests of files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BLOCK = 1 << 20  # bytes read at a time


def digest(value: Any) -> str:
    """12 hex digits of a JSON-able value; what JSON has no word for counts as its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(files: Iterable[Path], base: Path) -> str:
    """sha256 over names, relative to ``base`` where they lie below it, and contents of files."""
    whole = hashlib.sha256()
    for file in sorted(files):
        name = file.relative_to(base).as_posix() if file.is_relative_to(base) else file.name
        whole.update(f"{name}\x1f{file.stat().st_size}\x1f".encode())
        with open(file, "rb") as stream:
            while block := stream.read(BLOCK):
                whole.update(block)
    return whole.hexdigest()
