"""Trials as the runs folder has them: found by a key or its beginning, their settings flat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iris.errors import SettingError
from iris.io.files import read_json
from iris.settings import flatten


def find_trial(runs: Path, key: str) -> Path:
    """The folder of the trial whose key is, or begins with, ``key``.

    Raises:
        SettingError: no trial or several have it.
    """
    found = sorted(path for path in (runs / "trials").glob(f"{key}*") if path.is_dir()) if key else []
    exact = [path for path in found if path.name == key]
    if len(exact or found) != 1:
        many = (
            f"is the beginning of {', '.join(path.name for path in found[:8])}" if found else f"is no trial in {runs}"
        )
        raise SettingError(f"key {key!r} {many}; `ls {runs / 'trials'}` lists them")
    return (exact or found)[0]


def settings_of_trial(folder: Path) -> dict[str, Any]:
    """A trial's settings as flat keys, such as {"model.dim": 64}; empty before it first ran."""
    return flatten(read_json(folder / "settings.json") or {})


def size_of(folder: Path) -> int:
    """Bytes of a folder's files; a file that two names have counts once."""
    seen: dict[tuple[int, int], int] = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            facts = path.stat()
            seen[facts.st_dev, facts.st_ino] = facts.st_size
    return sum(seen.values())


def megabytes(size: int) -> str:
    """A size in MB (10^6 bytes), with a decimal below 10."""
    value = size / 1e6
    return f"{value:,.0f} MB" if value >= 10 else f"{value:.1f} MB"
