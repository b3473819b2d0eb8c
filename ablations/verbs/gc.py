"""What the runs folder holds, and what may go."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ablations.launch.job import ERROR, RESULT
from ablations.launch.pool import is_locked, try_lock
from ablations.launch.trial_state import LOCKS, state_of
from ablations.session.grid_record import load_record
from ablations.verbs.stored import megabytes, size_of
from iris.errors import SettingError
from iris.io.files import read_json
from iris.settings import setting

NAMES = (0, 0)
HELP = """\
What the runs folder holds, and what may go. Without delete=true nothing is deleted: the list and its sizes are printed. What
a living process works on is never taken.

  python -m ablations gc                                  what=checkpoints
  python -m ablations gc what=unused older=7d delete=true

  what=checkpoints   training state of finished stages; their weights and results stay
  what=failed        folders of failed trials
  what=unused        stages that no trial or unfinished grid needs, lists and logs of workers that are gone
  what=trials        whole trials, by keys= or older=
"""
UNITS = {"d": 86400, "h": 3600, "m": 60}
CHECKPOINTS = ("checkpoint*", "best*", "train")
KEPT = (
    "class-",
    "text-",
    "aesthetic-",
    "student-",
    "speed-",
)  # models, which a person may have trained for their own sake, and figures of reports
DAY = 86400.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of this verb."""

    what: str = setting("checkpoints", "what may go", choices=("checkpoints", "failed", "unused", "trials"))
    older: str | None = setting(None, "only what was not written for so long: 7d, 12h, 30m")
    keys: list = setting([], "only trials and stages whose keys begin so: keys=A,B")
    runs_dir: str = setting("runs", "the folder")
    delete: bool = setting(False, "delete it")

    def __post_init__(self) -> None:
        if self.older is not None and not re.fullmatch(r"\d+[dhm]", self.older):
            raise SettingError(f"older={self.older} must be a number of days, hours or minutes, such as 7d, 12h, 30m")
        if self.what == "trials" and not self.keys and self.older is None:
            raise SettingError("what=trials needs keys= or older=: it takes whole trials, results included")

    @property
    def runs(self) -> Path:
        """The folder."""
        return Path(self.runs_dir)

    def takes(self, path: Path, key: str) -> bool:
        """Whether age and key allow it."""
        seconds = 0 if self.older is None else int(self.older[:-1]) * UNITS[self.older[-1]]
        named = not self.keys or any(key.startswith(str(wanted)) for wanted in self.keys)
        return named and time.time() - newest(path) >= seconds


def run(names: list[str], settings: Settings, console: Console) -> int:
    """List what may go, and delete it if asked; returns the exit code."""
    if not settings.runs.is_dir():
        raise SettingError(f"runs_dir={settings.runs} is not a folder")
    clear(settings, console)
    return 0


def clear(choice: Settings, console: Console) -> int:
    """List what may go, and delete it if asked; returns the bytes."""
    found = [(path, size_of(path) if path.is_dir() else path.stat().st_size) for path in candidates(choice)]
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    total = 0
    for path, size in found:
        gone = not choice.delete or _delete(path, choice.runs)
        table.add_row(str(path.relative_to(choice.runs)), megabytes(size) if gone else "left: it is in use")
        total += size if gone else 0
    console.print(table, highlight=False)
    word = "deleted" if choice.delete else "would be deleted (add delete=true)"
    console.print(
        f"{len(found)} of {choice.what}, {megabytes(total)} {word}; {choice.runs} holds "
        f"{megabytes(size_of(choice.runs))}",
        highlight=False,
    )
    return total


def _delete(path: Path, runs: Path) -> bool:
    """Delete a trial, a stage or something of one, unless a process has begun to work there since it was listed."""
    kind, *below = path.relative_to(runs).parts
    place = runs / kind / below[0]
    with contextlib.ExitStack() as held:
        for name in LOCKS if kind in ("trials", "stages") else ():
            if path != place and not (place / name).exists():
                continue  # nobody ever held it, and the place stays
            lock = try_lock(place / name)
            if lock is None:
                return False
            held.enter_context(lock)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return True


def candidates(choice: Settings) -> Iterator[Path]:
    """What the choice may delete."""
    if choice.what == "unused":
        yield from _unused(choice)
        return
    for place in [*sorted((choice.runs / "trials").glob("*")), *sorted((choice.runs / "stages").glob("*"))]:
        state = state_of(place).state
        if not place.is_dir() or state == "running" or not choice.takes(place, place.name):
            continue
        if choice.what == "checkpoints" and state == "done":
            yield from (path for pattern in CHECKPOINTS for path in sorted(place.glob(pattern)))
        elif place.parent.name == "trials" and (
            choice.what == "trials" or (choice.what == "failed" and state == "failed")
        ):
            yield place


def _unused(choice: Settings) -> Iterator[Path]:
    """Stages that nobody names, and what workers left; nothing while a stage is made, which may need any of them."""
    if any(state_of(place).state == "running" for place in (choice.runs / "stages").glob("*")):
        return
    lists = [read_json(place / "stages.json") for place in (choice.runs / "trials").glob("*") if place.is_dir()]
    needed = {key for listed in lists for key in listed or []} | _planned(choice.runs)
    told = all(listed is not None for listed in lists)  # a trial that does not say what it needs may need any
    for place in sorted((choice.runs / "stages").glob("*")) if told else []:
        if (
            _shared(place)
            and place.name not in needed
            and state_of(place).state != "running"
            and choice.takes(place, place.name)
        ):
            yield place
    if any(is_locked(path) for path in (choice.runs / "pool").glob("slot-*.lock")):
        return
    submitted = _submitted(choice.runs)
    for place in [*sorted((choice.runs / "pool").glob("*")), *sorted((choice.runs / "logs").glob("*"))]:
        if place.name not in submitted and choice.takes(place, place.name):
            yield place


def _shared(place: Path) -> bool:
    """Whether a folder is work that is made again when it is needed, and no model."""
    return not place.name.startswith(KEPT)


def _planned(runs: Path) -> set[str]:
    """Stages of grids that are not finished: their trials may not have begun, or wait for a cluster."""
    needed = set()
    for path in (runs / "grids").glob("*.json"):
        record = load_record(path)
        folders = [runs / entry.folder for entry in record.trials]
        begun = any(folder.exists() for folder in folders) or time.time() - path.stat().st_mtime < DAY
        if begun and not all((folder / RESULT).exists() for folder in folders):
            needed |= {entry.key for entry in record.stages}
    return needed


def _submitted(runs: Path) -> set[str]:
    """Folders of logs that belong to jobs without an end: submitit keeps there what a queued job is to run."""
    found = set()
    for path in [*(runs / "trials").glob("*/job.json"), *(runs / "stages").glob("*/job.json")]:
        if not any((path.parent / name).exists() for name in (RESULT, ERROR)):
            found.add(Path((read_json(path) or {}).get("log", "")).parent.name)
    return found


def newest(path: Path) -> float:
    """When something in a folder was last written."""
    times = [entry.stat().st_mtime for entry in path.rglob("*") if entry.is_file()] if path.is_dir() else []
    return max([path.stat().st_mtime, *times])
