"""Finished weights, copied to a folder of a person's choice."""

from __future__ import annotations

import shutil
from pathlib import Path

from iris.errors import SettingError
from iris.io.files import naming


def check_out(out: str | None) -> None:
    """Raise a SettingError if ``out`` is something else than weights from before, or nothing."""
    path = None if out is None else Path(out).expanduser()
    if path is None or not path.exists():
        return
    if not path.is_dir():
        raise SettingError(f"out={out} is a file; it must be a folder")
    if any(path.iterdir()) and not (path / "config.json").exists():
        raise SettingError(f"out={out} is a folder with other files in it; it must be new, empty, or hold weights")


def publish(weights: Path, out: str) -> Path:
    """Copy finished weights to ``out``, which only then changes."""
    place = Path(out).expanduser()
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (place.with_name(f".{place.name}.{word}") for word in ("new", "old"))
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    try:
        _copy(weights, fresh)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if place.exists():
        place.rename(old)
    fresh.rename(place)
    shutil.rmtree(old, ignore_errors=True)
    return place


def _copy(folder: Path, place: Path) -> None:
    """As shutil.copytree, which gathers errors into one that has no number."""
    place.mkdir()
    for path in sorted(folder.rglob("*")):
        target = place / path.relative_to(folder)
        if path.is_dir():
            target.mkdir()
        else:
            with naming(target):
                shutil.copy2(path, target)
