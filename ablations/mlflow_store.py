"""Writing a grid into MLflow, one call at a time; whatever MLflow raises is raised here (tracking.py decides about it).

One experiment a grid, one parent run an invocation, one child run a trial. Every method can be called again after it
failed half-way: it does what is still missing.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablations.records import GridOutcome, TrialRecord
from ablations.tracking_payload import (
    arm_means,
    contact_sheet,
    dataset_fields,
    metric_name,
    metric_points,
    parent_note,
    read_samples,
)

PARAMS_PER_BATCH, METRICS_PER_BATCH = 100, 1000     # MLflow's own limits (mlflow/utils/validation.py)
PARAM_LENGTH, TAG_LENGTH = 6000, 5000
ARTIFACT_FILES = ("settings.json", "gates.json", "result.json", "error.json", "metrics.jsonl")


@dataclass
class TrialRun:
    """A trial's child run; ``run_id`` is None until the store has made it."""

    key: str
    name: str
    tags: dict[str, str]
    params: dict[str, str]
    run_id: str | None = None
    described: bool = False
    ended: bool = False
    start_ms: int | None = None
    last_step: int = -1                             # the last step whose metrics are in the store
    curves: set[str] = field(default_factory=set)
    stamp: tuple[int, int] = (0, 0)                 # (bytes, mtime in ns) of metrics.jsonl when last read


class GridStore:
    """The runs of one grid in one MLflow store.

    Args:
        experiment: the experiment's name.
        uri: tracking URI.
        local_root: folder of the default sqlite store, whose artifacts go to ``<local_root>/mlartifacts``; None for
            any other store, which then chooses the artifacts' place itself.
    """

    def __init__(self, experiment: str, uri: str, local_root: Path | None) -> None:
        self.experiment, self.uri, self.local_root = experiment, uri, local_root
        self.parent_id: str | None = None
        self.client: Any = None
        self._experiment_id: str | None = None
        self._header: GridOutcome | None = None
        self._parent_params: dict[str, str] = {}
        self._parent_described = False

    def connect(self) -> None:
        """Import MLflow; make the store's tables and the experiment when they are not there."""
        if self.client is not None:
            return
        _calm_mlflow()
        from filelock import FileLock
        from mlflow import MlflowClient

        root = self.local_root
        # Two invocations in a fresh folder must not both create the tables.
        with FileLock(f"{root / 'mlflow.db'}.lock") if root else contextlib.nullcontext():
            client = MlflowClient(tracking_uri=self.uri)
            found = client.get_experiment_by_name(self.experiment)
            if found is None:
                place = (root / "mlartifacts" / self.experiment).as_uri() if root else None
                self._experiment_id = client.create_experiment(self.experiment, artifact_location=place)
            else:
                self._experiment_id = found.experiment_id
                if found.lifecycle_stage == "deleted":
                    client.restore_experiment(found.experiment_id)
        self.client = client

    def describe(self, header: GridOutcome, params: Mapping[str, str]) -> None:
        """Say what the grid is (no call to MLflow yet)."""
        self._header, self._parent_params = header, dict(params)

    def ensure_parent(self) -> None:
        """The parent run, its params, tags, inputs and description."""
        self.connect()
        if self._header is None:
            raise ValueError("describe() comes before any run")
        header = self._header
        if self.parent_id is None:
            self._end_abandoned_runs()
            tags = self._common_tags() | {"kind": "grid", "question": header.question, "claim": header.claim,
                                          "command": header.command, "mlflow.note.content": parent_note(header)}
            tags |= {f"hardware.{name}": str(value) for name, value in header.hardware.items()}
            name = f"{header.name} {time.strftime('%Y-%m-%d %H:%M')}"
            self.parent_id = self.client.create_run(self._experiment_id, tags=_short(tags), run_name=name).info.run_id
        if not self._parent_described:
            self._log_params(self.parent_id, self._parent_params)
            self.client.log_inputs(self.parent_id, datasets=self._inputs())
            self._parent_described = True

    def ensure_trial(self, trial: TrialRun) -> None:
        """The trial's child run, its settings as params and its inputs."""
        self.ensure_parent()
        if trial.run_id is None:
            tags = self._common_tags() | trial.tags | {"mlflow.parentRunId": self.parent_id}
            run = self.client.create_run(self._experiment_id, tags=_short(tags), run_name=trial.name,
                                         start_time=trial.start_ms)
            trial.run_id = run.info.run_id
        if not trial.described:
            self._log_params(trial.run_id, trial.params)
            self.client.log_inputs(trial.run_id, datasets=self._inputs())
            trial.described = True

    def sync(self, trial: TrialRun, folder: Path) -> None:
        """Log the metrics of the steps after ``trial.last_step``.

        The file is read whole each time it changed: it is small, and a resumed trial truncates it back to its
        checkpoint, after which no byte offset means anything. The steps it then repeats are the same numbers again
        (a resumed trial equals one never stopped), and are skipped.
        """
        file = folder / "metrics.jsonl"
        try:
            stat = file.stat()
        except FileNotFoundError:
            return
        if (stat.st_size, stat.st_mtime_ns) == trial.stamp:
            return
        points = [point for point in metric_points(file) if point.step > trial.last_step]
        self.ensure_trial(trial)
        self._log_metrics(trial.run_id, [(p.name, p.value, p.time_ms, p.step) for p in points])
        trial.curves.update(point.name for point in points)
        trial.last_step = max((point.step for point in points), default=trial.last_step)
        trial.stamp = stat.st_size, stat.st_mtime_ns

    def complete(self, trial: TrialRun, record: TrialRecord) -> None:
        """Everything about a trial that ended: the rest of its curves, final metrics, files, pictures, its status."""
        file, result = record.folder / "metrics.jsonl", record.folder / "result.json"
        if trial.run_id is None and record.cached and file.is_file():
            trial.start_ms = next((point.time_ms for point in metric_points(file)), None)
        self.ensure_trial(trial)
        self.sync(trial, record.folder)
        self._log_finals(trial, record)
        self._log_files(trial, record)
        ended = int(result.stat().st_mtime * 1000) if record.cached and result.is_file() else None
        self.client.set_terminated(trial.run_id, "FINISHED" if record.state == "done" else "FAILED", end_time=ended)
        trial.ended = True

    def kill(self, trial: TrialRun) -> None:
        """End a child run whose trial was stopped with the grid."""
        if trial.run_id is not None and not trial.ended:
            self.client.set_tag(trial.run_id, "state", "killed")
            self.client.set_terminated(trial.run_id, "KILLED")
            trial.ended = True

    def close(self, outcome: GridOutcome | None, report: Path | None, status: str, verdict: str | None) -> None:
        """End the parent run: summary over the arms, the report folder, the verdict, the status."""
        self.ensure_parent()
        tags = {"verdict": verdict} if verdict else {}
        if outcome is not None:
            states = [record.state for record in outcome.records]
            values = {"trials": len(states), "trials_done": states.count("done"),
                      "trials_failed": states.count("failed"), "wall_seconds": outcome.wall_seconds,
                      "trials_cached": sum(record.cached for record in outcome.records)} | arm_means(outcome)
            now = int(time.time() * 1000)
            self._log_metrics(self.parent_id, [(name, float(value), now, 0) for name, value in values.items()])
            tags |= {"mlflow.note.content": parent_note(outcome, verdict)}
        self._set_tags(self.parent_id, tags)
        if report is not None and Path(report).is_dir():
            self.client.log_artifacts(self.parent_id, str(report), "report")
        self.client.set_terminated(self.parent_id, status)

    # -- parts ----------------------------------------------------------------------------------------------------

    def _log_finals(self, trial: TrialRun, record: TrialRecord) -> None:
        now = int(time.time() * 1000)
        values = dict(record.metrics) | {f"seconds/{name}": value for name, value in record.seconds.items()}
        named = {metric_name(name): float(value) for name, value in values.items() if value is not None}
        # At step 0 MLflow's charts draw bars across runs. A curve may have the name already, hence the suffix.
        self._log_metrics(trial.run_id, [(f"{name}_final" if name in trial.curves else name, value, now, 0)
                                         for name, value in named.items()])
        tags = {"state": record.state, "cached": str(record.cached).lower(), "matched": record.matched or "nothing"}
        tags |= {f"environment.{name}": str(value) for name, value in record.environment.items()}
        if record.error is not None:
            tags |= {f"error.{name}": str(record.error.get(name, "")) for name in ("cause", "message", "log")}
        self._set_tags(trial.run_id, tags)

    def _log_files(self, trial: TrialRun, record: TrialRecord) -> None:
        for name in ARTIFACT_FILES:
            if (record.folder / name).is_file():
                self.client.log_artifact(trial.run_id, str(record.folder / name))
        samples = read_samples(record.folder / "samples.npz")
        if "images" in samples:
            sheet = contact_sheet(samples["images"])
            self.client.log_image(trial.run_id, sheet, artifact_file="samples.png")
            # The keyed form is the one that MLflow's charts put side by side for several runs.
            self.client.log_image(trial.run_id, sheet, key="samples", step=max(trial.last_step, 0))
        if "real" in samples:
            self.client.log_image(trial.run_id, contact_sheet(samples["real"]), artifact_file="real.png")
        log = Path((record.error or {}).get("log") or "")
        if log.is_file():
            self.client.log_artifact(trial.run_id, str(log), "logs")

    def _common_tags(self) -> dict[str, str]:
        header = self._header
        return {
            "grid": header.name, "judge": str(header.judge.get("name", "none")),
            "judge_sha256": str(header.judge.get("sha256", "")), "data": str(header.data.get("name", "")),
            "data_fingerprint": str(header.data.get("fingerprint", "")), "git_commit": header.commit,
            "host": socket.gethostname(), "pid": str(os.getpid()), "mlflow.user": _user(),
            "mlflow.source.name": "ablations.run", "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": header.commit.removesuffix("+changes"),
        }

    def _inputs(self) -> list[Any]:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        parts = ((self._header.data, "fingerprint", "training"), (self._header.judge, "sha256", "judge"))
        return [DatasetInput(Dataset(**dataset_fields(part, digest)), [InputTag("mlflow.data.context", context)])
                for part, digest, context in parts if part.get("name")]

    def _log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        for batch in _batches([Param(name, value[:PARAM_LENGTH]) for name, value in params.items()], PARAMS_PER_BATCH):
            self.client.log_batch(run_id, params=batch)

    def _log_metrics(self, run_id: str, points: Sequence[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        for batch in _batches(points, METRICS_PER_BATCH):
            self.client.log_batch(run_id, metrics=[Metric(*point) for point in batch])

    def _set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        for batch in _batches([RunTag(*tag) for tag in _short(tags).items()], PARAMS_PER_BATCH):
            self.client.log_batch(run_id, tags=batch)

    def _end_abandoned_runs(self) -> None:
        """Runs whose driver was killed hard stay RUNNING for ever: end those of this host whose process is gone."""
        import psutil

        rows = self.client.search_runs([self._experiment_id], max_results=1000, filter_string=(
            f"attributes.status = 'RUNNING' and tags.host = '{socket.gethostname()}'"))
        for run in rows:
            if not psutil.pid_exists(int(run.data.tags.get("pid", os.getpid()))):
                self.client.set_terminated(run.info.run_id, "KILLED")


def _calm_mlflow() -> None:
    """What must be in place before MLflow is imported; whatever the user set stays."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")       # nothing leaves the machine unasked
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")        # migrations log 50 lines into the live table
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")   # default 7 with back-off: minutes for each call
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), size):
        yield items[first:first + size]


def _short(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: value[:TAG_LENGTH] for name, value in tags.items()}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):         # a container's user without a name
        return "unknown"
