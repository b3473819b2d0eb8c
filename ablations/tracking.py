"""The grid's tracker: imports what the trials write into MLflow, without ever holding up or stopping them.

Only the driver process talks to MLflow; trials write JSON Lines. Eight workers that meet on a fresh sqlite store lose
runs and can leave it unusable, so the store has exactly one writer. Calls return at once: one thread does the work in
order, so neither MLflow's import (3 to 8 s) nor a slow server delays a trial or the table on the screen.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ablations.mlflow_store import GridStore, TrialRun
from ablations.records import GridOutcome, TrialRecord
from ablations.tracking_payload import flatten

RETRY_SECONDS = 30.0        # after a failed call the store is left alone this long
STATUSES = ("FINISHED", "FAILED", "KILLED")


class Tracker:
    """Writes a grid's trials to MLflow from the driver process; never raises for MLflow's sake.

    Args:
        experiment: name of the MLflow experiment, the grid's name.
        uri: tracking URI; None means the environment's MLFLOW_TRACKING_URI, and without one a local store:
            ``sqlite:///<root>/mlflow.db`` with artifacts under ``<root>/mlartifacts``, which a plain ``mlflow ui``
            started in ``root`` shows. (Artifacts stay out of ``mlruns/``: a folder of that name from an older MLflow
            makes ``mlflow ui`` choose the retired file store.)
        root: folder of the default store.
        warn: called with one sentence when MLflow first fails, from the tracker's thread. Default: print to stderr.

    A call that fails is tried again at the trial's next call and once more in ``finish``; ``problems`` says what is
    still missing then. As a context manager: leaving by an exception before ``finish`` marks what runs as KILLED
    (KeyboardInterrupt) or FAILED.
    """

    def __init__(self, experiment: str, uri: str | None, root: Path,
                 warn: Callable[[str], None] | None = None) -> None:
        self.root = Path(root).resolve()
        self.default_uri = f"sqlite:///{self.root / 'mlflow.db'}"
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or self.default_uri
        self.problems: list[str] = []
        self._store = GridStore(experiment, self.uri, self.root if self.uri == self.default_uri else None)
        self._warn = warn or (lambda text: print(text, file=sys.stderr))
        self._warned = False
        self._started = False
        self._finished = False
        self._trials: dict[str, TrialRun] = {}
        self._unlogged: dict[str, TrialRecord] = {}     # ended, not yet complete in the store
        self._queued_syncs: set[str] = set()
        self._quiet_until = 0.0
        self._ready = threading.Event()
        self._queue: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    @property
    def parent_id(self) -> str | None:
        """Id of the invocation's run; None until the store has made it."""
        return self._store.parent_id

    @property
    def command(self) -> str:
        """The command (or address) that shows the runs, as typed in the current folder."""
        if self.uri.startswith(("http://", "https://")):
            return self.uri
        # MLflow's own rule: numbered folders with a meta.yaml in ./mlruns select the file store over ./mlflow.db.
        old_store = any(Path("mlruns").glob("[0-9]*/meta.yaml"))
        if self.uri == self.default_uri and Path.cwd() == self.root and not old_store:
            return "uv run mlflow ui"
        return f"uv run mlflow ui --backend-store-uri {self.uri}"

    def prepare(self) -> None:
        """Import MLflow and create the store's tables and the experiment, in the background."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self._thread.start()
            self._put("a connection", self._store.connect)

    def ready(self, timeout: float = 60.0) -> bool:
        """Wait until the store exists or could not be reached; returns whether it can be written to."""
        self.prepare()
        self._ready.wait(timeout)
        return self._store.client is not None

    def start(self, header: GridOutcome, seeds: Sequence[int], baseline: Mapping[str, Any]) -> None:
        """Open the parent run. ``header`` is the outcome as known before any trial ran; its records are not read."""
        params = {f"axis.{name}": ", ".join(map(str, values)) for name, values in header.axes.items()}
        params |= {f"baseline.{name}": str(value) for name, value in baseline.items()}
        params |= {f"decide.{name}": str(value) for name, value in header.decide.items()}
        params |= {"seeds": ", ".join(map(str, seeds)), "match": header.match}
        self._started = True
        self._store.describe(header, params)
        self.prepare()
        self._put("the parent run", self._store.ensure_parent)

    def trial_started(self, key: str, arm: str, seed: int, baseline: bool, settings: Mapping[str, Any]) -> None:
        """Open the trial's child run: its settings as params, who it is as tags."""
        trial = self._remember(key, arm, seed, baseline, settings)
        self._put(trial.name, lambda: self._store.ensure_trial(trial))

    def sync(self, key: str, folder: Path) -> None:
        """Import what ``folder/metrics.jsonl`` gained. Cheap; call it as often as you like for trials that run."""
        trial = self._trials.get(key)
        if trial is None or key in self._queued_syncs:
            return

        def job() -> None:
            self._queued_syncs.discard(key)     # first: lines written from here on are worth another call
            self._store.sync(trial, Path(folder))

        self._queued_syncs.add(key)
        self._put(trial.name, job)

    def trial_finished(self, record: TrialRecord) -> None:
        """Complete the trial's run (opened here when trial_started was not called, as for a cached trial)."""
        trial = self._remember(record.key, record.arm, record.seed, record.baseline, record.settings)
        self._unlogged[record.key] = record
        self._put(trial.name, lambda: self._complete(trial, record))

    def finish(self, outcome: GridOutcome | None, report: Path | None, status: str = "FINISHED",
               verdict: str | None = None, timeout: float = 120.0) -> list[str]:
        """Close the parent run: summary metrics, the report folder as artifact, the verdict as tag, the status.

        ``status`` is FINISHED, FAILED or KILLED. Children still open end as KILLED. Waits up to ``timeout`` seconds.
        Returns ``problems``: a sentence for each thing that is not in the store; empty when all is. Raises
        ValueError for another status.
        """
        if status not in STATUSES:
            raise ValueError(f"status is {status!r}; allowed: {', '.join(STATUSES)}")
        if self._finished or not self._started:
            return self.problems
        self._finished = True
        self._put("the end of the grid", lambda: self._close(outcome, report, status, verdict))
        self._queue.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self.problems.append(f"MLflow at {self.uri} was still being written to after {timeout:.0f} s.")
        return self.problems

    def __enter__(self) -> Self:
        self.prepare()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.finish(None, None, "KILLED" if killed else "FAILED", timeout=20.0)

    # -- in the thread --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            what, job = item
            try:
                # What is skipped in a quiet time is not lost: a later sync, trial_finished or the end does it.
                if time.monotonic() >= self._quiet_until or what == "the end of the grid":
                    job()
                else:
                    self._queued_syncs.clear()
            except Exception as error:      # MLflow, its server and its database raise everything
                self._trouble(what, error)
            self._ready.set()

    def _trouble(self, what: str, error: Exception) -> None:
        self._quiet_until = time.monotonic() + RETRY_SECONDS
        if not self._warned:
            self._warned = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            self._warn(f"MLflow at {self.uri} did not take {what}: {reason}. The trials go on; tracking is retried.")

    def _complete(self, trial: TrialRun, record: TrialRecord) -> None:
        self._store.complete(trial, record)
        self._unlogged.pop(record.key, None)

    def _close(self, outcome: GridOutcome | None, report: Path | None, status: str, verdict: str | None) -> None:
        try:
            for record in list(self._unlogged.values()):
                self._complete(self._trials[record.key], record)
            for trial in self._trials.values():
                self._store.kill(trial)
            self._store.close(outcome, report, status, verdict)
        except Exception as error:
            self._trouble("the end of the grid", error)
            names = [self._trials[key].name for key in self._unlogged]
            missing = f"all of these trials: {'; '.join(names)}" if names else "the end of the grid (summary, report)"
            missing = missing if self.parent_id else "anything of this grid"
            self.problems.append(f"MLflow at {self.uri} does not have {missing}. Nothing else is lost: the same "
                                 f"command logs it from the trials' folders, without training, once MLflow answers.")

    # -- small parts ----------------------------------------------------------------------------------------------

    def _put(self, what: str, job: Callable[[], None]) -> None:
        self._queue.put((what, job))

    def _remember(self, key: str, arm: str, seed: int, baseline: bool, settings: Mapping[str, Any]) -> TrialRun:
        if key not in self._trials:
            tags = {"kind": "trial", "key": key, "arm": arm, "seed": str(seed), "baseline": str(baseline).lower(),
                    "state": "running"}
            self._trials[key] = TrialRun(key, f"{arm}, seed {seed}", tags, flatten(settings))
        return self._trials[key]
