"""The grid's tracker: writes down what MLflow is to know, and has a process beside the driver tell it (follow.py).

Trials write JSON Lines, one driver writes the grid's journal, one process talks to MLflow: eight workers that meet on a
fresh sqlite store lose runs and can leave it unusable. Neither MLflow's import (3 to 8 s, 300 MB) nor a slow server is
in the driver's way; a server that is down, or a driver that is killed, only delays what is told: the same command, or
``python -m ablations sync``, sends the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ablations.answer.records import GridOutcome, PlannedTrial, TrialRecord
from ablations.track.journal import Journal
from ablations.track.location import Location
from iris.io.follower import Follower

STATUSES = ("FINISHED", "FAILED", "KILLED")


class Tracker:
    """Has MLflow told of a grid's trials; never raises for MLflow's sake.

    Args:
        experiment: the grid's name.
        uri, root: of the store, as ``Location.of``.
        warn: called with a sentence when MLflow fails, from a thread. Default: print to stderr.
        models_mb: size up to which trained models are logged; 0: none.

    Attributes:
        problems: in the end, a sentence for each thing that MLflow does not have.

    As a context manager: leaving by an exception before ``finish`` marks what runs as KILLED (KeyboardInterrupt) or FAILED.

    Raises:
        SettingError: nothing can ever be written to ``uri``.
    """

    def __init__(
        self,
        experiment: str,
        uri: str | None,
        root: Path,
        runs: Path,
        warn: Callable[[str], None] | None = None,
        models_mb: float = 50.0,
    ) -> None:
        self.location = Location.of(uri, root).check()
        self.experiment, self.runs = experiment, Path(runs)
        self.problems: list[str] = []
        self._settings = {"uri": uri, "root": str(root), "models_mb": models_mb}
        self._warn = warn or (lambda text: print(text, file=sys.stderr))
        self._journal: Journal | None = None
        self._grid: tuple[GridOutcome, list[PlannedTrial], dict[str, str]] | None = None
        self._follower: Follower | None = None  # while this driver is the one that writes the journal
        self._unwritten = ""  # why something is not in the journal
        self._over = False

    @property
    def command(self) -> str:
        """The command (or address) that shows the runs, as typed in the current folder."""
        return self.location.command

    def start(
        self, header: GridOutcome, trials: Iterable[Any], seeds: Sequence[int], baseline: Mapping[str, Any]
    ) -> None:
        """Say what the grid is. The same trials are the same run in MLflow, whoever runs them and how often.

        Args:
            header: the outcome as known before any trial ran; its records are not read.
            trials: all of the grid, as ``ablations.question.plan.Trial``.
        """
        planned = [PlannedTrial.of(trial) for trial in trials]
        params = {f"axis.{name}": ", ".join(map(str, values)) for name, values in header.axes.items()}
        params |= {f"baseline.{name}": str(value) for name, value in baseline.items()}
        params |= {f"decide.{name}": str(value) for name, value in header.decide.items()}
        self._grid = header, planned, params | {"seeds": ", ".join(map(str, seeds)), "match": header.match}
        self._journal = Journal.of(self.runs, self.experiment, [trial.key for trial in planned])
        self._write(lambda journal: None)

    def trial_started(self, key: str) -> None:
        """A trial runs, for the first time or again."""
        self._write(lambda journal: journal.began(key))

    def trial_finished(self, record: TrialRecord) -> None:
        """A trial ended, now or before; called again, when more is known of it."""
        self._write(lambda journal: journal.ended(record))

    def finish(
        self, outcome: GridOutcome | None, report: Path | None, status: str = "FINISHED", verdict: str | None = None
    ) -> list[str]:
        """End the grid's run with its report and verdict, and what did not end as KILLED; returns ``problems``.

        Waits for a store that answers. Raises ValueError for a status that is none of ``STATUSES``.
        """
        if status not in STATUSES:
            raise ValueError(f"status is {status!r}; allowed: {', '.join(STATUSES)}")
        self._end(lambda journal: journal.closed(outcome, report, status, verdict))
        return self.problems

    def detach(self) -> None:
        """Leave the runs open: the trials go on, and the same command goes on with telling of them."""
        self._end(lambda journal: journal.left())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.finish(None, None, "KILLED" if killed else "FAILED")

    def _write(self, write: Callable[[Journal], None]) -> None:
        """Into the journal, unless another driver writes it; a disk that is full or read-only stops nothing."""
        try:
            if self._follower is None:
                if not self._journal.acquire():
                    return
                self._journal.plan(*self._grid)
                self._follower = Follower(self._settings, self._warn)
                self._follower.follow(self._journal.path)
            write(self._journal)
        except OSError as error:
            if not self._unwritten:
                self._unwritten = f"What MLflow is to know cannot be written down: {error}."
                self._warn(f"{self._unwritten} The trials go on.")

    def _end(self, write: Callable[[Journal], None]) -> None:
        if self._journal is None or self._over:
            return
        self._over = True
        self._write(write)
        if self._follower is not None:
            self.problems += self._follower.end()
            self._journal.release()
        if self._unwritten:
            self.problems.append(f"{self._unwritten} The same command writes it, without training, when it can.")
        elif self._follower is None:
            self.problems.append("Another command runs this grid too; that one tells MLflow of it.")
