"""The command: ``python -m ablations.track.sync``. Send MLflow what it does not have of a runs folder; train nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import Timeout

from ablations.track.grid import Grid
from ablations.track.journal import journals
from ablations.track.location import Location
from ablations.track.store import Store
from ablations.track.work import Stage, Work, is_held
from iris.errors import SettingError
from iris.io.follower import MARK
from iris.settings import suggestion

HELP = """\
Send MLflow what it does not have of a runs folder: after a server was down, or to build a new store from it.

  python -m ablations.track.sync                                  # to MLFLOW_TRACKING_URI, or else ./mlflow.db
  python -m ablations.track.sync mixers depth                     # these grids only
  python -m ablations.track.sync track.uri=http://host:5000       # to another store
  python -m ablations.track.sync runs_dir=/shared/runs track.models_mb=0

What is there stays as it is: the command may be run at any time, and again. A grid that runs is left to its command.
Exit codes: 0 all is there, 1 something could not be sent, 2 a setting cannot be used, 130 interrupted."""

SETTINGS = {"runs_dir": "runs", "track.uri": "", "track.models_mb": "50"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in words or "-h" in words:
        print(HELP)
        return 0
    try:
        grids, settings = _parsed(words)
        runs = Path(settings["runs_dir"]).absolute()
        location = Location.of(settings["track.uri"], Path.cwd()).check()
        works = _chosen(runs, grids, _megabytes(settings))
        store = Store(location)
        done = [_send(work, store) for work in works]
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this stopped", file=sys.stderr)
        return 130
    print(f"MLflow   {location.command}")
    return 0 if all(done) else 1


def _send(work: Work, store: Store) -> bool:
    """Send a grid or a stage and say how it went; whether all of it is there."""
    try:
        work.lock.acquire(timeout=0)
    except Timeout:
        print(f"{work.name}: is run now, by a command that sends it itself")
        return True
    try:
        work.sync(store, alive=is_held(work.worked_on))
    except Exception as error:  # MLflow, its server and its database raise everything
        print(f"{work.name}: MLflow at {store.location.shown}: {store.location.explained(error)}", file=sys.stderr)
        return False
    finally:
        work.lock.release()
    for label, error in work.problems.items():
        print(f"{work.name}: {label}: {store.location.explained(error)}", file=sys.stderr)
    print(f"{work.name}: {work.has}, {work.points} points that were missing")
    return work.told


def _chosen(runs: Path, grids: Sequence[str], models_mb: float) -> list[Work]:
    """The grids, and, where none is named, the stages of ``iris.training``."""
    if not runs.is_dir():
        raise SettingError(f"runs_dir={runs}: there is no such folder")
    found = {journal.path: journal.header().name for journal in journals(runs) if journal.planned}
    names = sorted(set(found.values()))
    for grid in grids:
        if grid not in names:
            raise SettingError(
                f"grid {grid!r} was not run in {runs}{suggestion(grid, names)}; there are: {', '.join(names) or 'none'}"
            )
    chosen = [Grid(path, models_mb) for path, name in found.items() if not grids or name in grids]
    return chosen + [Stage(mark.parent) for mark in sorted(runs.glob(f"stages/*/{MARK}")) if not grids]


def _parsed(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    grids, settings = [], dict(SETTINGS)
    for word in words:
        name, mark, value = word.partition("=")
        name = name if mark else "grid"
        if name == "grid":
            grids.append(value if mark else word)
        elif name in SETTINGS:
            settings[name] = value
        else:
            raise SettingError(
                f"{name} is no setting of this command{suggestion(name, list(SETTINGS))}; allowed: "
                f"{', '.join(['grid', *SETTINGS])}"
            )
    return grids, settings


def _megabytes(settings: dict[str, str]) -> float:
    try:
        value = float(settings["track.models_mb"])
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise SettingError(f"track.models_mb={settings['track.models_mb']} must be a number of at least 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
