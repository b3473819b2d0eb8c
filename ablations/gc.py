"""What the runs folder holds, and what may go: ``python -m ablations.gc [what=checkpoints] [older=7d] [keys=A,B] [delete]``.

    what=checkpoints   training state of finished trials and stages; their weights, samples and results stay
    what=failed        folders of failed trials
    what=unused        shared work that no trial or unfinished grid needs, lists and logs of workers that are gone;
                       never what `python -m iris.training` made
    what=trials        whole trials, by keys= or older=
    older=7d           only what was not written for so long: d, h or m
    keys=A,B           only trials and stages whose keys begin so
    runs_dir=runs      the folder

Without ``delete`` nothing is deleted: the list and its sizes are printed. What a living process works on is never taken.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ablations.launch.grid_record import load_record
from ablations.launch.job import ERROR, RESULT
from ablations.launch.pool import is_locked
from ablations.launch.stored import megabytes, size_of
from ablations.launch.trial_state import state_of
from iris.errors import SettingError
from iris.io.files import read_json

KINDS = ("checkpoints", "failed", "unused", "trials")
UNITS = {"d": 86400, "h": 3600, "m": 60}
CHECKPOINTS = ("checkpoint*", "best*", "train")
SHARED = ("data-", "latent-", "text-", "reference-")
DAY = 86400.0


@dataclass(frozen=True)
class Choice:
    """What the command line asks for."""

    runs: Path
    what: str = "checkpoints"
    older: float = 0.0  # seconds
    keys: tuple[str, ...] = ()
    delete: bool = False

    def takes(self, path: Path, key: str) -> bool:
        """Whether age and key allow it."""
        named = not self.keys or any(key.startswith(wanted) for wanted in self.keys)
        return named and time.time() - newest(path) >= self.older


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in words or "-h" in words:
        print(__doc__)
        return 0
    try:
        choice = parse(words)
        if not choice.runs.is_dir():
            raise SettingError(f"runs_dir={choice.runs} is not a folder")
        clear(choice, Console())
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(words: Sequence[str]) -> Choice:
    """The command line.

    Raises:
        SettingError: a word or value that is not known.
    """
    given = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in ("what", "older", "keys", "runs_dir", "delete") or (name == "delete") != ("=" not in word):
            raise SettingError(f"{word!r} is unknown; allowed: what=, older=, keys=, runs_dir=, delete")
        given[name] = value
    what, older = given.get("what", "checkpoints"), given.get("older", "")
    if what not in KINDS:
        raise SettingError(f"what={what} is unknown; allowed: {', '.join(KINDS)}")
    age = re.fullmatch(r"(\d+)([dhm])", older)
    if older and not age:
        raise SettingError(f"older={older} must be a number of days, hours or minutes, such as 7d, 12h, 30m")
    keys = tuple(key for key in given.get("keys", "").split(",") if key)
    if what == "trials" and not keys and not age:
        raise SettingError("what=trials needs keys= or older=: it takes whole trials, results included")
    seconds = int(age[1]) * UNITS[age[2]] if age else 0
    return Choice(Path(given.get("runs_dir", "runs")), what, seconds, keys, "delete" in given)


def clear(choice: Choice, console: Console) -> int:
    """List what may go, and delete it if asked; returns the bytes."""
    found = [(path, size_of(path) if path.is_dir() else path.stat().st_size) for path in candidates(choice)]
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for path, size in found:
        table.add_row(str(path.relative_to(choice.runs)), megabytes(size))
        if choice.delete:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    console.print(table, highlight=False)
    total = sum(size for _, size in found)
    word = "deleted" if choice.delete else "would be deleted (add `delete`)"
    console.print(
        f"{len(found)} of {choice.what}, {megabytes(total)} {word}; {choice.runs} holds "
        f"{megabytes(size_of(choice.runs))}",
        highlight=False,
    )
    return total


def candidates(choice: Choice) -> Iterator[Path]:
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


def _unused(choice: Choice) -> Iterator[Path]:
    """Shared work that nobody names, and what workers left."""
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
    """Whether a folder is a grid's shared work. Trained models lie beside it; those say what they are in settings.json."""
    return place.name.startswith("prepare-") or (
        place.name.startswith(SHARED) and not (place / "settings.json").exists()
    )


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
    for path in [
        *(runs / "trials").glob("*/job.json"),
        *(runs / "stages").glob("*/job.json"),
        *(runs / "speed").glob("*/job.json"),
    ]:
        if not any((path.parent / name).exists() for name in (RESULT, ERROR)):
            found.add(Path((read_json(path) or {}).get("log", "")).parent.name)
    return found


def newest(path: Path) -> float:
    """When something in a folder was last written."""
    times = [entry.stat().st_mtime for entry in path.rglob("*") if entry.is_file()] if path.is_dir() else []
    return max([path.stat().st_mtime, *times])


if __name__ == "__main__":
    sys.exit(main())
