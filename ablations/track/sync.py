"""The command: ``python -m ablations.track.sync``. Send MLflow what it does not have of a runs folder; train nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ablations.track.journal import TRIALS, Journal, journals
from ablations.track.location import Location, unreachable
from ablations.track.mlflow_store import GridStore, TrialRun
from ablations.track.stage_tracking import MARK, Tracker, unsent
from iris.errors import SettingError
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


@dataclass
class Sent:
    """What became of a grid."""

    trials: int = 0
    points: int = 0
    problems: list[str] = field(default_factory=list)


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
        done = [_send(journal, location, _megabytes(settings)) for journal in _chosen(runs, grids)]
        if not grids:
            done += [_send_stage(mark.parent, location) for mark in sorted(runs.glob(f"stages/*/{MARK}"))]
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this stopped", file=sys.stderr)
        return 130
    print(f"MLflow   {location.command}")
    return 0 if all(done) else 1


def send_grid(journal: Journal, location: Location, models_mb: float = 50.0) -> Sent:
    """Send a grid's journal, and what lies in its trials' folders; the caller holds the journal.

    Raises what MLflow raises when the store cannot be reached.
    """
    outcome, end, sent = journal.outcome(), journal.end, Sent()
    store = GridStore(location, journal.key, replace(outcome, records=[]), journal.params, models_mb)
    store.open()
    trials = {}
    for planned in journal.trials:
        trial = TrialRun(planned, journal.runs / TRIALS / planned.key, record=journal.record(planned))
        if trial.record is None and not (trial.folder / "metrics.jsonl").exists():
            continue  # it was never started
        trials[planned.key] = trial
        try:
            store.bring(trial)
            sent.trials += 1
        except Exception as error:  # of one trial: the others are sent all the same
            if unreachable(error):
                raise
            sent.problems.append(f"{planned.label}: {location.explained(error)}")
        sent.points += trial.points
    if end is None:  # the driver was killed
        store.close(None, None, "KILLED", None, trials)
    else:
        store.close(outcome, end["report"], end["status"], end["verdict"], trials)
    if not sent.problems:
        journal.sent(location.uri)
    return sent


def _send(journal: Journal, location: Location, models_mb: float) -> bool:
    """Send one grid and say how it went; whether all of it is there."""
    if not journal.acquire():
        print(f"{journal.key}: is run now, by a command that sends it itself")
        return True
    try:
        sent = send_grid(journal, location, models_mb)
    except Exception as error:  # MLflow, its server and its database raise everything
        print(f"{journal.key}: MLflow at {location.shown}: {location.explained(error)}", file=sys.stderr)
        return False
    finally:
        journal.release()
    for problem in sent.problems:
        print(f"{journal.key}: {problem}", file=sys.stderr)
    print(f"{journal.key}: {sent.trials} trial{'s' * (sent.trials != 1)}, {sent.points} points that were missing")
    return not sent.problems


def _send_stage(folder: Path, location: Location) -> bool:
    """Send a finished stage of ``iris.training``; one that is not finished is its own command's."""
    if not (folder / "result.json").exists():
        return True
    with Tracker.again(folder, lambda text: print(f"{folder.name}: {text}", file=sys.stderr), location):
        pass
    if unsent(folder):
        return False
    print(f"{folder.name}: a stage of training")
    return True


def _chosen(runs: Path, grids: Sequence[str]) -> list[Journal]:
    if not runs.is_dir():
        raise SettingError(f"runs_dir={runs}: there is no such folder")
    found = [journal for journal in journals(runs) if journal.planned]
    names = sorted({journal.experiment for journal in found})
    for grid in grids:
        if grid not in names:
            raise SettingError(
                f"grid {grid!r} was not run in {runs}{suggestion(grid, names)}; there are: {', '.join(names) or 'none'}"
            )
    return [journal for journal in found if not grids or journal.experiment in grids]


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
