"""Send MLflow what it does not have of a runs folder; train nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout
from rich.console import Console

from ablations.question.track import Track
from ablations.track.grid import Grid
from ablations.track.journal import journals
from ablations.track.location import Location
from ablations.track.store import Store
from ablations.track.work import Stage, Work
from iris.errors import SettingError
from iris.io.follower import MARK
from iris.settings import setting, suggestion

NAMES = (0, None)
HELP = """\
Send MLflow what it does not have of a runs folder: after a server was down, or to build a new store from it.

  python -m ablations sync                                  to MLFLOW_TRACKING_URI, or else ./mlflow.db
  python -m ablations sync mixers depth                     these grids only
  python -m ablations sync track.uri=http://host:5000       to another store
  python -m ablations sync runs_dir=/shared/runs track.models_mb=0

What is there stays as it is: the command may be run at any time, and again. A grid that runs is left to its command.
Exit codes: 0 all is there, 1 something could not be sent, 2 a setting cannot be used, 130 interrupted.
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of this verb."""

    track: Track
    runs_dir: str = setting("runs", "the folder")


def run(names: list[str], settings: Settings, console: Console) -> int:
    """Send the grids of these names, or all grids and stages of training; returns the exit code."""
    location = Location.of(settings.track.uri, Path.cwd()).check()
    works = _chosen(Path(settings.runs_dir).absolute(), names, settings.track.models_mb)
    sender = _Sender(Store(location), console)
    done = [sender.send(work) for work in works]
    sender.say(f"MLflow   {location.command}")
    return 0 if all(done) else 1


class _Sender:
    def __init__(self, store: Store, console: Console) -> None:
        self.store, self.console = store, console

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def send(self, work: Work) -> bool:
        """Send a grid or a stage and say how it went; whether all of it is there."""
        location = self.store.location
        try:
            work.lock.acquire(timeout=0)
            work.sync(self.store, alive=False)
        except Timeout:
            self.say(f"{work.name}: is run now, by a command that sends it itself")
            return True
        except Exception as error:  # MLflow, its server and its database raise everything
            self.say(f"{work.name}: MLflow at {location.shown}: {location.explained(error)}")
            return False
        finally:
            work.lock.release()
        for label, error in work.problems.items():
            self.say(f"{work.name}: {label}: {location.explained(error)}")
        self.say(f"{work.name}: {work.has}, {work.points} points that were missing")
        return work.told


def _chosen(runs: Path, grids: Sequence[str], models_mb: float) -> list[Work]:
    """The grids, and, where none is named, the stages of ``iris.training``."""
    if not runs.is_dir():
        raise SettingError(f"runs_dir={runs}: there is no such folder")
    found = {journal.path: journal.header["name"] for journal in journals(runs)}
    names = sorted(set(found.values()))
    for grid in grids:
        if grid not in names:
            raise SettingError(
                f"grid {grid!r} was not run in {runs}{suggestion(grid, names)}; there are: {', '.join(names) or 'none'}"
            )
    chosen = [Grid(path, models_mb) for path, name in found.items() if not grids or name in grids]
    return chosen + [Stage(mark.parent) for mark in sorted(runs.glob(f"stages/*/{MARK}")) if not grids]
