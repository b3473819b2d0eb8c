"""Where reports lie: a folder a grid, and below it one for each question that was asked with other settings."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iris.io.files import read_json
from iris.io.hashing import digest

VERDICT = "verdict.json"
LONGEST = 80  # characters of a folder's name
# What of a command line changes nothing about the question: how many seeds, where and how it is run.
HOW = ("seeds", "launcher", "threads", "runs_dir", "reports_dir", "dry_run", "action", "track", "reason", "compute")


def report_folder(reports: Path, grid: str, words: Sequence[str]) -> Path:
    """The folder of a command's report: ``reports``/GRID, or, with settings of its own, one below it named by them."""
    own = sorted(word for word in words if _asks(word.partition("=")[0]))
    if not own:
        return reports / grid
    shown = [_shown(word) for word in own]
    name = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", " ".join(shown)).strip("_.")
    if len(name) > LONGEST or shown != own:  # what is left out of the name tells two questions apart
        name = f"{name[:LONGEST]}-{digest(own)[:6]}"
    return reports / grid / name


def _asks(key: str) -> bool:
    """Whether a setting is part of the question; which grid it is says the folder above."""
    return key != "grid" and key.partition(".")[0] not in HOW


def _shown(word: str) -> str:
    """A word with the last part of a path, which says nothing elsewhere."""
    key, _, value = word.partition("=")
    return f"{key}={Path(value).name}" if "/" in value and not value.startswith(("[", "{")) else word


@dataclass(frozen=True)
class Neighbour:
    """Another report of the same grid; ``place`` is relative to the folder that lists it."""

    place: str
    settings: str  # "" for the grid as its file has it
    verdict: str
    written: str


def neighbours(folder: Path, grid: str) -> list[Neighbour]:
    """The other reports of a grid, the newest first."""
    top = folder if folder.name == grid and folder.parent.name != grid else folder.parent
    found = []
    for place in (top, *sorted(top.glob("*/"))):
        about: dict[str, Any] | None = read_json(place / VERDICT)
        if place == folder or about is None or about.get("grid") != grid:
            continue
        name = "" if place == top else place.name
        shown = os.path.relpath(place, folder)
        found.append(Neighbour(shown, name, str(about.get("verdict")), str(about.get("written"))))
    return sorted(found, key=lambda one: one.written, reverse=True)
