"""The grid's tracker: tells MLflow of the trials, without ever holding them up, stopping them or losing anything.

Only the driver process talks to MLflow; trials write JSON Lines. Eight workers that meet on a fresh sqlite store lose
runs and can leave it unusable, so a grid has exactly one writer. Calls return at once: one thread does the work, so
neither MLflow's import (3 to 8 s) nor a slow server delays a trial or the table on the screen. What MLflow is to know
is written down first (journal.py), so a server that is down, or a driver that is killed, only delays it: the same
command, or ``python -m ablations.track.sync``, sends the rest.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ablations.answer.records import GridOutcome, TrialRecord
from ablations.track.journal import Journal, PlannedTrial
from ablations.track.location import Location, unreachable
from ablations.track.mlflow_store import GridStore, TrialRun

RETRY_SECONDS = 30.0  # after a failed call the store is left alone this long
PATIENCE_SECONDS = 30.0  # that the end of the grid waits for a store that answers nothing,
END_SECONDS = 120.0  # and for one that answers slowly
SAY_SECONDS = 20.0  # between two words to a person who waits for the end
STATUSES = ("FINISHED", "FAILED", "KILLED")


class Tracker:
    """Tells MLflow of a grid's trials from the driver process; never raises for MLflow's sake.

    Args:
        experiment: name of the MLflow experiment, the grid's name.
        uri: tracking URI; None: see ``Location.of``.
        root: folder of the default store.
        runs: the runs folder.
        warn: called with one sentence when MLflow first fails, from the tracker's thread. Default: print to stderr.
        models_mb: size up to which trained models are logged; 0: none.

    ``problems`` says in the end what MLflow does not have. As a context manager: leaving by an exception before
    ``finish`` marks what runs as KILLED (KeyboardInterrupt) or FAILED.

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
        self.experiment, self.runs, self.models_mb = experiment, Path(runs), models_mb
        self.problems: list[str] = []
        self._warn = warn or (lambda text: print(text, file=sys.stderr))
        self._warned: set[str] = set()
        self._journal: Journal | None = None
        self._header: tuple[GridOutcome, Sequence[PlannedTrial], dict[str, str]] | None = None
        self._closed = False  # the store has the end of the grid
        self._writing = False  # this process is the grid's one writer
        self._store: GridStore | None = None
        self._trials: dict[str, TrialRun] = {}
        self._end: tuple[GridOutcome | None, Path | None, str, str | None] | None = None
        # What the thread is to look at, in order; its state besides is the trials' own.
        self._changed = threading.Condition()
        self._waiting: dict[str, None] = {}
        self._busy, self._stopping = False, False
        self._quiet_until = 0.0
        self._pen = threading.RLock()  # of the journal: the driver and the thread write it
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    @property
    def command(self) -> str:
        """The command (or address) that shows the runs, as typed in the current folder."""
        return self.location.command

    @property
    def parent_id(self) -> str | None:
        """Id of the grid's run; None until the store has it."""
        return self._store.parent_id if self._store else None

    def start(
        self, header: GridOutcome, trials: Iterable[Any], seeds: Sequence[int], baseline: Mapping[str, Any]
    ) -> None:
        """Say what the grid is. The same trials are the same run in MLflow, whoever runs them and how often.

        Args:
            header: the outcome as known before any trial ran; its records are not read.
            trials: all of the grid, as ``ablations.question.grid.Trial``.
        """
        planned = [PlannedTrial.of(trial) for trial in trials]
        params = {f"axis.{name}": ", ".join(map(str, values)) for name, values in header.axes.items()}
        params |= {f"baseline.{name}": str(value) for name, value in baseline.items()}
        params |= {f"decide.{name}": str(value) for name, value in header.decide.items()}
        params |= {"seeds": ", ".join(map(str, seeds)), "match": header.match}
        self._header = header, planned, params
        self._journal = Journal.of(self.runs, self.experiment, [trial.key for trial in planned])
        self._trials = {trial.key: TrialRun(trial, self.runs / "trials" / trial.key) for trial in planned}
        self._store = GridStore(self.location, self._journal.key, header, params, self.models_mb)
        self._write_down()
        self._thread.start()
        self._look("")

    def trial_started(self, key: str) -> None:
        """A trial runs, for the first time or again."""
        self._trials[key].record = None
        self._look(key)

    def sync(self, key: str) -> None:
        """A running trial may have new metrics. Cheap; call it as often as you like."""
        self._look(key)

    def trial_finished(self, record: TrialRecord) -> None:
        """A trial ended, now or before; called again, when more is known of it."""
        self._trials[record.key].record = record
        self._write_down(lambda journal: journal.ended(record))
        self._look(record.key)

    def wait(self) -> bool:
        """Wait until MLflow was told of all there is; False: it did not take something, and is left alone for now."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy and (not self._waiting or self._quiet))
            return not self._waiting

    def finish(
        self, outcome: GridOutcome | None, report: Path | None, status: str = "FINISHED", verdict: str | None = None
    ) -> list[str]:
        """End the grid's run: summary metrics, the report folder as artifact, the verdict as tag, the status.

        ``status`` is FINISHED, FAILED or KILLED. Trials that did not end are marked KILLED. Waits for a store that
        answers. Returns ``problems``: a sentence for what is not in the store; empty when all is. Raises ValueError for
        another status.
        """
        if status not in STATUSES:
            raise ValueError(f"status is {status!r}; allowed: {', '.join(STATUSES)}")
        if self._end is None and not self._stopping and self._journal is not None:
            self._end = outcome, report, status, verdict
            self._write_down(lambda journal: journal.closed(outcome, report, status, verdict))
            self._stop()
            self._say_what_is_missing()
        return self.problems

    def detach(self) -> None:
        """Leave the runs open: the trials go on, and the same command goes on with telling of them."""
        if self._journal is not None:
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.finish(None, None, "KILLED" if killed else "FAILED")

    # -- what the driver's calls share ----------------------------------------------------------------------------

    def _look(self, key: str) -> None:
        """The thread is to look at a trial, or, without a key, at the grid."""
        with self._changed:
            self._waiting[key] = None
            self._changed.notify_all()

    def _write_down(self, write: Callable[[Journal], None] | None = None) -> None:
        """Into the journal; all of it, when another process wrote it until now."""
        try:
            with self._pen:
                if not self._writing and self._journal.acquire():
                    self._writing, write = True, self._write_all
                if self._writing and write is not None:
                    write(self._journal)
        except OSError as error:  # a full or read-only disk: MLflow is told all the same
            self._writing = True
            self._trouble("journal", f"What MLflow is to know cannot be written down: {error}. The trials go on.")

    def _write_all(self, journal: Journal) -> None:
        journal.plan(*self._header)
        for trial in self._trials.values():
            if trial.record is not None:
                journal.ended(trial.record)
        if self._end is not None:
            journal.closed(*self._end)

    def _stop(self) -> None:
        """Let the thread do what waits, as long as the store answers."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        began = time.monotonic()
        patience = END_SECONDS if self.location.file else PATIENCE_SECONDS  # a file is slow, but never silent
        said = began
        while self._thread.is_alive():
            if time.monotonic() > said + SAY_SECONDS:
                said = time.monotonic()
                self._warn(
                    f"MLflow has {sum(trial.settled for trial in self._trials.values())} of {len(self._trials)} trials so far"
                )
            client = self._store.client
            heard = max(began, client.answered) if client else began
            if time.monotonic() > min(heard + patience, began + END_SECONDS):
                break
            self._thread.join(0.1)
        if self._writing and not self._thread.is_alive():
            self._journal.release()

    def _say_what_is_missing(self) -> None:
        missing = [trial.planned.label for trial in self._trials.values() if trial.record and not trial.settled]
        if not self._writing:
            self.problems.append("Another command runs this grid too; that one tells MLflow of it.")
        elif missing or not self._closed:
            what = f"all of {len(missing)} trials ({'; '.join(missing[:5])}{'; …' if len(missing) > 5 else ''})"
            what = "anything of this grid" if self.parent_id is None else what if missing else "the end of the grid"
            self.problems.append(
                f"MLflow at {self.location.shown} does not have {what}. Nothing is lost: the same "
                "command, or python -m ablations.track.sync, sends it without training once MLflow answers."
            )

    # -- in the thread --------------------------------------------------------------------------------------------

    @property
    def _quiet(self) -> bool:
        return time.monotonic() < self._quiet_until

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                while not self._stopping and (not self._waiting or self._quiet):
                    self._changed.wait(max(0.0, self._quiet_until - time.monotonic()) if self._waiting else None)
                if self._stopping:
                    break
                key = next(iter(self._waiting))
                del self._waiting[key]
                self._busy = True
            if self._bring(key) is not None:
                with self._changed:
                    self._waiting.setdefault(key)  # again, after the others
                    self._quiet_until = time.monotonic() + RETRY_SECONDS
        self._finish()

    def _bring(self, key: str) -> Exception | None:
        """Everything of a trial, or of the grid, that the store does not have; returns what went wrong."""
        self._write_down()
        if not self._writing:
            return BlockingIOError("another command tells MLflow of this grid")
        try:
            if key:
                self._store.bring(self._trials[key])
            else:
                self._store.open()
        except Exception as error:  # MLflow, its server and its database raise everything
            what = self._trials[key].planned.label if key else "the grid's run"
            self._trouble(
                "store",
                f"MLflow at {self.location.shown} did not take {what}: "
                f"{self.location.explained(error)}. The trials go on; MLflow is tried again.",
            )
            return error
        return None

    def _finish(self) -> None:
        """All that waits, once; a store that cannot be reached is not tried for each trial."""
        for key in ["", *self._waiting]:
            error = self._bring(key)
            if error is not None and (not self._writing or unreachable(error)):
                return
        if self._end is None:
            return
        outcome, report, status, verdict = self._end
        try:
            self._store.close(outcome, report, status, verdict, self._trials)
            self._closed = True
        except Exception as error:
            self._trouble(
                "store",
                f"MLflow at {self.location.shown} did not take the end of the grid: {self.location.explained(error)}.",
            )
        if self._closed and all(trial.settled for trial in self._trials.values() if trial.record):
            with contextlib.suppress(OSError):
                self._journal.sent(self.location.uri)

    def _trouble(self, what: str, sentence: str) -> None:
        """Tell the person, once of each kind."""
        if what not in self._warned:
            self._warned.add(what)
            self._warn(sentence)
