"""A stage's run in MLflow, written from a thread of its own: whatever MLflow does, the training goes on."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

EXPERIMENT = "training"
PARAMS_PER_BATCH, METRICS_PER_BATCH = 100, 1000     # MLflow's own limits
PARAM_LENGTH = 6000
RETRY_SECONDS = 30.0        # after a failed call the store is left alone this long
END_SECONDS = 60.0          # that the end of a stage waits for what is still to be written


class Tracker:
    """One run of the experiment "training"; a stage that goes on after a stop goes on with its run.

    Args:
        key: of the stage, and the name of its run.
        settings: dotted names to values, the run's params.
        warn: called with one sentence when MLflow first fails, from the tracker's thread.
        uri: tracking URI; None means MLFLOW_TRACKING_URI, and without one ``sqlite:///<root>/mlflow.db`` with artifacts
            under ``<root>/mlartifacts``, which a plain ``mlflow ui`` started in ``root`` shows.
        root: folder of the default store.

    As a context manager: leaving it by an exception marks the run as KILLED or FAILED.
    """

    def __init__(self, key: str, settings: Mapping[str, Any], warn: Callable[[str], None], uri: str | None = None,
                 root: Path | None = None) -> None:
        self.key, self.settings, self._warn = key, dict(settings), warn
        self.root = (root or Path.cwd()).resolve()
        default = f"sqlite:///{self.root / 'mlflow.db'}"
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or default
        self._local = self.root if self.uri == default else None
        self.problem: str | None = None
        self._client: Any = None
        self._run_id: str | None = None
        self._last_step, self._quiet_until = -1, 0.0
        self._rows: list[dict[str, float]] = []             # not yet in the store
        self._pictures: list[tuple[Path, str]] = []
        self._wake: queue.Queue[str | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._wake.put(None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)      # a signal, Ctrl-C
        self._wake.put("FINISHED" if kind is None else "KILLED" if stopped else "FAILED")
        self._thread.join(END_SECONDS if kind is None else END_SECONDS / 6)

    def row(self, row: Mapping[str, float]) -> None:
        """A row of the loop's metrics; returns at once."""
        self._rows.append(dict(row))
        self._wake.put(None)

    def picture(self, path: Path, place: str) -> None:
        """A file for the artifact folder ``place``; returns at once."""
        self._pictures.append((path, place))
        self._wake.put(None)

    def _work(self) -> None:
        status = None
        while status is None:
            status = self._wake.get()
            if status is not None or time.monotonic() >= self._quiet_until:
                try:
                    self._write(status)
                except Exception as error:      # MLflow, its server and its database raise everything
                    self._trouble(error)

    def _trouble(self, error: Exception) -> None:
        self._quiet_until = time.monotonic() + RETRY_SECONDS
        if self.problem is None:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            self.problem = f"MLflow at {self.uri}: {reason}. The training goes on, and MLflow is tried again."
            self._warn(self.problem)

    def _write(self, status: str | None) -> None:
        """Everything that waits; what fails waits on."""
        self._connect()
        count = len(self._rows)
        points = [point for row in self._rows[:count] if row["step"] > self._last_step for point in metric_points(row)]
        if points:
            from mlflow.entities import Metric

            for first in range(0, len(points), METRICS_PER_BATCH):
                batch = [Metric(*point) for point in points[first : first + METRICS_PER_BATCH]]
                self._client.log_batch(self._run_id, metrics=batch)
            self._last_step = points[-1][3]
        del self._rows[:count]
        while self._pictures:
            self._client.log_artifact(self._run_id, str(self._pictures[0][0]), self._pictures[0][1])
            self._pictures.pop(0)
        if status is not None:
            self._client.set_terminated(self._run_id, status)

    def _connect(self) -> None:
        """Import MLflow, and find or make the store, the experiment and the run."""
        if self._run_id is not None:
            return
        calm_mlflow()
        from filelock import FileLock
        from mlflow import MlflowClient
        from mlflow.entities import Param

        root = self._local
        # Two commands in a fresh folder must not both create the tables.
        with FileLock(f"{root / 'mlflow.db'}.lock") if root else contextlib.nullcontext():
            client = self._client = MlflowClient(tracking_uri=self.uri)
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                place = (root / "mlartifacts" / EXPERIMENT).as_uri() if root else None
                experiment = client.create_experiment(EXPERIMENT, artifact_location=place)
            else:
                experiment = found.experiment_id
        earlier = client.search_runs([experiment], f"tags.stage_key = '{self.key}'", max_results=1)
        if earlier:
            run_id = earlier[0].info.run_id
            client.update_run(run_id, status="RUNNING")
            self._last_step = max((p.step for p in client.get_metric_history(run_id, "loss")), default=-1)
        else:
            tags = {"stage_key": self.key, "stage": self.key.partition("-")[0], "mlflow.source.name": "iris.training"}
            run_id = client.create_run(experiment, tags=tags, run_name=self.key).info.run_id
            params = [Param(name, str(value)[:PARAM_LENGTH]) for name, value in self.settings.items()]
            for first in range(0, len(params), PARAMS_PER_BATCH):
                client.log_batch(run_id, params=params[first : first + PARAMS_PER_BATCH])
        self._run_id = run_id


def metric_points(row: Mapping[str, float]) -> list[tuple[str, float, int, int]]:
    """Name, value, time in ms and step of each curve of a row; of what MLflow does not allow in a name, _."""
    time_ms, step = int(row["time"] * 1000), int(row["step"])
    return [(re.sub(r"[^\w\-./: ]", "_", name), float(value), time_ms, step) for name, value in row.items()
            if name not in ("step", "steps", "time") and math.isfinite(value)]


def calm_mlflow() -> None:
    """What must be in place before MLflow is imported; whatever the user set stays."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")       # nothing leaves the machine unasked
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")   # default 7 with back-off: minutes for each call
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
