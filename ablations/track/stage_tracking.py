"""A stage's run in MLflow, written from a thread of its own: whatever MLflow does, the training goes on.

What the run shall have lies in the stage's folder: metrics.jsonl, pictures, and tracking.json, which says what it is
and whether MLflow has all of it. So nothing is lost with a process or a server; the next command sends the rest.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ablations.track.curves import Curves
from ablations.track.location import Location
from iris.io.files import write_json

EXPERIMENT = "training"
METRICS, PICTURES, MARK = "metrics.jsonl", "pictures", "tracking.json"
PARAMS_PER_BATCH, PARAM_LENGTH = 100, 6000  # MLflow's own limits
RETRY_SECONDS = 30.0  # after a failed call the store is left alone this long
PATIENCE_SECONDS = 30.0  # that the end of a stage waits for a store that answers nothing,
END_SECONDS = 120.0  # and for one that answers slowly


class Tracker:
    """One run of the experiment "training"; a stage that goes on after a stop goes on with its run.

    Args:
        folder: the stage's; its name names the run.
        settings: dotted names to values, the run's params.
        warn: called with one sentence when MLflow first fails, from the tracker's thread.
        uri: tracking URI; None: see ``Location.of``.
        root: folder of the default store; None: the current one.

    As a context manager: leaving it by an exception marks the run as KILLED or FAILED.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        warn: Callable[[str], None],
        uri: str | None = None,
        root: Path | None = None,
    ) -> None:
        self.folder, self.settings, self._warn = folder, dict(settings), warn
        self.location = Location.of(uri, root or Path.cwd())
        self.problem: str | None = None
        self._run: Run | None = None
        self._pictures: dict[str, float] = {}  # name -> when what the run has was written
        self._quiet_until, self._status = 0.0, ""
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    @classmethod
    def again(cls, folder: Path, warn: Callable[[str], None], location: Location) -> Tracker:
        """For what MLflow missed of a finished stage."""
        return cls(folder, json.loads((folder / MARK).read_text())["settings"], warn, location.uri, location.root)

    def __enter__(self) -> Self:
        write_json(self.folder / MARK, {"settings": self.settings, "sent": False})
        self._thread.start()
        self.news()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)  # a signal, Ctrl-C
        self._status = "FINISHED" if kind is None else "KILLED" if stopped else "FAILED"
        self.news()
        began, total = time.monotonic(), END_SECONDS if kind is None else PATIENCE_SECONDS
        patience = total if self.location.file else PATIENCE_SECONDS  # a file is slow, but never silent
        while self._thread.is_alive():
            heard = max(began, self._run.client.answered) if self._run else began
            if time.monotonic() > min(heard + patience, began + total):
                break
            self._thread.join(0.1)

    def news(self) -> None:
        """The folder has more than before; returns at once."""
        self._wake.set()

    # -- in the thread --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        status = ""
        while not status:
            self._wake.wait()
            self._wake.clear()
            status = self._status  # what was written before it was set is sent before the run ends
            if status or time.monotonic() >= self._quiet_until:
                try:
                    self._write(status)
                except Exception as error:  # MLflow, its server and its database raise everything
                    self._trouble(error)

    def _write(self, status: str) -> None:
        """Everything that is not there yet."""
        if self._run is None:
            self._run = open_run(self.location, self.folder, self.settings)
        client, run_id = self._run.client, self._run.run_id
        self._run.curves.send(client, run_id)
        for path, written in self._fresh_pictures():
            client.log_artifact(run_id, str(path), PICTURES)
            self._pictures[path.name] = written
        if status:
            client.set_terminated(run_id, status)
            write_json(self.folder / MARK, {"settings": self.settings, "sent": True})

    def _fresh_pictures(self) -> Iterator[tuple[Path, float]]:
        for path in sorted((self.folder / PICTURES).glob("*.png")):
            written = path.stat().st_mtime
            if not path.name.startswith(".") and self._pictures.get(path.name) != written:
                yield path, written

    def _trouble(self, error: Exception) -> None:
        self._quiet_until = time.monotonic() + RETRY_SECONDS
        if self.problem is None:
            self.problem = (
                f"MLflow at {self.location.shown}: {self.location.explained(error)}. The training goes on, "
                "and MLflow is tried again; what it misses then, the next command sends."
            )
            self._warn(self.problem)


@dataclass(frozen=True)
class Run:
    """An open run."""

    client: Any
    run_id: str
    curves: Curves


def open_run(location: Location, folder: Path, settings: Mapping[str, Any]) -> Run:
    """The run of a stage's folder, found or made."""
    client, experiment = location.connect(EXPERIMENT)
    from mlflow.entities import Param

    key = folder.name
    # The first one, should an answer once have been lost and the run been made twice.
    earlier = client.search_runs([experiment], f"tags.stage_key = '{key}'", max_results=1, order_by=["start_time ASC"])
    if earlier:
        run_id = earlier[0].info.run_id
        client.update_run(run_id, status="RUNNING")
    else:
        tags = {"stage_key": key, "stage": key.partition("-")[0], "mlflow.source.name": "iris.training"}
        run_id = client.create_run(experiment, tags=tags, run_name=key).info.run_id
    there = earlier[0].data.params if earlier else {}
    params = [Param(name, str(value)[:PARAM_LENGTH]) for name, value in settings.items() if name not in there]
    for first in range(0, len(params), PARAMS_PER_BATCH):
        client.log_batch(run_id, params=params[first : first + PARAMS_PER_BATCH])
    return Run(client, run_id, Curves(folder / METRICS, fresh=not earlier))


def unsent(folder: Path) -> bool:
    """Whether MLflow misses something of a stage's folder that it was to have."""
    try:
        return not json.loads((folder / MARK).read_text())["sent"]
    except FileNotFoundError:  # it was not to have any
        return False
