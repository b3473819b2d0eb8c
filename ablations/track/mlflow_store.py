"""Writing a grid into MLflow, one call at a time; whatever MLflow raises is raised here (tracking.py decides about it).

One experiment a grid's name, one run a grid, one child run a trial, whoever runs the grid and how often. What is there
is asked of the store, by tags, and never remembered beside it: every method can be called again after it failed
half-way, by this process or another one, and does what is still missing.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablations.answer.records import GridOutcome, TrialRecord
from ablations.track import mlflow_runs as runs
from ablations.track.curves import Curves, metric_name, read_rows
from ablations.track.journal import PlannedTrial
from ablations.track.location import Location
from ablations.track.mlflow_model import log_model, megabytes
from ablations.track.tracking_payload import (
    arm_means,
    contact_sheet,
    data_inputs,
    flatten,
    grid_tags,
    parent_note,
    read_samples,
    trial_tags,
)

ARTIFACT_FILES = ("settings.json", "gates.json", "result.json", "error.json", "metrics.jsonl")
ENDED = ("FINISHED", "FAILED", "KILLED")
ERROR = ("cause", "message", "log")


@dataclass
class TrialRun:
    """A trial's child run, and what of it is in the store."""

    planned: PlannedTrial
    folder: Path
    record: TrialRecord | None = None  # how it ended
    run_id: str | None = None
    status: str = ""  # in the store
    data: Any = None  # params, metrics and tags in the store, where they are known
    tried: bool = False  # it was to be made, and nobody knows whether it was
    described: bool = False
    curves: Curves | None = None
    logged: TrialRecord | None = None  # the record that is in the store
    points: int = 0  # sent by this process

    @property
    def settled(self) -> bool:
        """Whether the store has all of it."""
        return self.record is not None and self.logged == self.record


class GridStore:
    """The runs of one grid in one MLflow store.

    Args:
        key: names the grid among those of the same name.
        header: the grid; its records are not read.
        params: of the grid's run.
        models_mb: size up to which trained models are logged; 0: none.
    """

    def __init__(
        self, location: Location, key: str, header: GridOutcome, params: Mapping[str, str], models_mb: float = 50.0
    ) -> None:
        self.location, self.key, self.header, self.params = location, key, header, dict(params)
        self.models_mb = models_mb
        self.client: Any = None
        self.parent_id: str | None = None
        self._experiment_id = ""
        self._described = False
        self._found: dict[str, Any] = {}  # children that were there before, by trial key

    # -- the grid's run -------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """The client and the experiment."""
        if self.client is None:
            self.client, self._experiment_id = self.location.connect(self.header.name)

    def open(self) -> None:
        """The grid's run, found or made: its params, tags, inputs and description."""
        self.connect()
        tags = grid_tags(self.header, self.key)
        if self.parent_id is None:
            self._end_abandoned_runs()
            there = self._runs(f"tags.grid_key = '{self.key}'")
            for run in there[1:]:  # an answer was lost, and the run was made twice
                self.client.delete_run(run.info.run_id)
            if there:
                self._found = self._children(there[0].info.run_id)
                self.client.update_run(there[0].info.run_id, status="RUNNING")
                self.parent_id = there[0].info.run_id
            else:
                name = f"{self.header.name} {time.strftime('%Y-%m-%d %H:%M')}"
                run = self.client.create_run(self._experiment_id, tags=runs.short(tags), run_name=name)
                self.parent_id = run.info.run_id
        if not self._described:
            runs.set_tags(self.client, self.parent_id, tags)
            there = self.client.get_run(self.parent_id).data.params
            runs.log_params(self.client, self.parent_id, self.params, there)
            self.client.log_inputs(self.parent_id, datasets=self._inputs())
            self._described = True

    def close(
        self,
        outcome: GridOutcome | None,
        report: Path | None,
        status: str,
        verdict: str | None,
        trials: Mapping[str, TrialRun],
    ) -> None:
        """End the grid's run: summary over the arms, the report folder, the verdict, the status."""
        self.open()
        for trial in trials.values():
            self._kill(trial)
        self._delete_strays(trials)
        tags = {"verdict": verdict} if verdict else {}
        if outcome is not None:
            states = [record.state for record in outcome.records]
            values = {
                "trials": len(states),
                "trials_done": states.count("done"),
                "trials_failed": states.count("failed"),
                "wall_seconds": outcome.wall_seconds,
                "trials_cached": sum(record.cached for record in outcome.records),
            } | arm_means(outcome)
            values, there = _floats(values), self.client.get_run(self.parent_id).data.metrics
            runs.log_values(self.client, self.parent_id, values, _now(), there)
            tags |= {"mlflow.note.content": parent_note(outcome, verdict)}
        runs.set_tags(self.client, self.parent_id, tags)
        if report is not None and Path(report).is_dir():
            self.client.log_artifacts(self.parent_id, str(report), "report")
        self.client.set_terminated(self.parent_id, status)

    # -- a trial's run --------------------------------------------------------------------------------------------

    def bring(self, trial: TrialRun) -> None:
        """Everything of a trial that is not there yet: its run, its new points, and, once it ended, all the rest."""
        try:
            self._ensure(trial)
            record = trial.record
            whole = trial.status == "FINISHED"  # set last: with it, all but later measures is there
            if not whole:
                trial.points += trial.curves.send(self.client, trial.run_id)
            if record is None or trial.settled:
                return
            self._log_finals(trial, record)
            if not whole:
                self._log_files(trial, record)
                status = "FINISHED" if record.state == "done" else "FAILED"
                self.client.set_terminated(trial.run_id, status, end_time=_written(record.folder))
                trial.status = status
            trial.logged = record
        finally:
            trial.data = None

    def _ensure(self, trial: TrialRun) -> None:
        """The child run, its settings as params, its tags and its inputs."""
        self.open()
        key = trial.planned.key
        tags = trial_tags(self.header, trial.planned, self.parent_id)
        if trial.run_id is None:
            found = self._found.pop(key, None)
            if found is None and trial.tried:
                mine = f"tags.mlflow.parentRunId = '{self.parent_id}' and tags.key = '{key}'"
                found = next(iter(self._runs(mine)), None)
            trial.tried = True
            if found is None:
                run = self.client.create_run(
                    self._experiment_id,
                    tags=runs.short(tags | {"state": "running"}),
                    run_name=trial.planned.label,
                    start_time=_begun(trial.folder),
                )
            else:
                run, trial.status = found, found.info.status
            trial.data = run.data
            trial.curves = Curves(trial.folder / "metrics.jsonl", fresh=found is None)
            trial.run_id = run.info.run_id
        if trial.status in ENDED and trial.record is None:  # it is run again
            runs.set_tags(self.client, trial.run_id, tags | {"state": "running"})
            self.client.update_run(trial.run_id, status="RUNNING")
            trial.status = "RUNNING"
        if not trial.described and trial.status != "FINISHED":
            runs.log_params(self.client, trial.run_id, flatten(trial.planned.settings), self._data(trial).params)
            self.client.log_inputs(trial.run_id, datasets=self._inputs())
            trial.described = True

    def _data(self, trial: TrialRun) -> Any:
        if trial.data is None:
            trial.data = self.client.get_run(trial.run_id).data
        return trial.data

    def _kill(self, trial: TrialRun) -> None:
        """End a child run whose trial was stopped with the grid."""
        if trial.run_id is not None and trial.status not in ENDED:
            runs.set_tags(self.client, trial.run_id, {"state": "killed"})
            self.client.set_terminated(trial.run_id, "KILLED")
            trial.status = "KILLED"

    def _log_finals(self, trial: TrialRun, record: TrialRecord) -> None:
        client, run_id, there = self.client, trial.run_id, self._data(trial)
        values = dict(record.metrics) | {f"seconds/{name}": value for name, value in record.seconds.items()}
        named = {metric_name(name): value for name, value in _floats(values).items()}
        curves = trial.curves.names()  # a curve may have the name already, hence the suffix
        named = {f"{name}_final" if name in curves else name: value for name, value in named.items()}
        # A fixed time, so that a call that is repeated adds nothing; a later measure needs a later one, to be the last.
        written = None if trial.status == "FINISHED" else _written(record.folder)
        runs.log_values(client, run_id, named, written or _now(), there.metrics)
        error = record.error or {}
        tags = {"state": record.state, "matched": record.matched or "nothing"}
        tags |= {f"environment.{name}": str(value) for name, value in record.environment.items()}
        tags |= {f"error.{name}": str(error.get(name, "")) for name in ERROR if error}
        if trial.status != "FINISHED":
            tags |= {"cached": str(record.cached).lower()}
        runs.set_tags(client, run_id, tags, there.tags)
        for name in [] if error else there.tags.keys() & {f"error.{name}" for name in ERROR}:
            client.delete_tag(run_id, name)

    def _log_files(self, trial: TrialRun, record: TrialRecord) -> None:
        for name in ARTIFACT_FILES:
            if (record.folder / name).is_file():
                self.client.log_artifact(trial.run_id, str(record.folder / name))
        samples = read_samples(record.folder / "samples.npz")
        if "images" in samples:
            sheet = contact_sheet(samples["images"])
            self.client.log_image(trial.run_id, sheet, artifact_file="samples.png")
            steps = [row["step"] for row in read_rows(record.folder / "metrics.jsonl")[0]]
            runs.log_picture(
                self.client,
                trial.run_id,
                sheet,
                "samples",
                int(steps[-1]) if steps else 0,
                _written(record.folder) or 0,
            )
        if "real" in samples:
            self.client.log_image(trial.run_id, contact_sheet(samples["real"]), artifact_file="real.png")
        log = Path((record.error or {}).get("log") or "")
        if log.is_file():
            self.client.log_artifact(trial.run_id, str(log), "logs")
        model = record.folder / "model"
        if record.state == "done" and model.is_dir() and megabytes(model) <= self.models_mb:
            tags = {"key": record.key, "arm": record.arm, "seed": str(record.seed), "git_commit": self.header.commit}
            log_model(self.client, self._experiment_id, trial.run_id, model, record.settings.get("sample", {}), tags)

    # -- parts ----------------------------------------------------------------------------------------------------

    def _runs(self, filter_string: str) -> list[Any]:
        return list(runs.find_runs(self.client, self._experiment_id, filter_string))

    def _children(self, parent_id: str) -> dict[str, Any]:
        """The child runs by key; of several the finished one, or else the oldest."""
        there = self._runs(f"tags.mlflow.parentRunId = '{parent_id}'")
        return {
            run.data.tags.get("key", ""): run for run in sorted(there, key=lambda run: run.info.status == "FINISHED")
        }

    def _delete_strays(self, trials: Mapping[str, TrialRun]) -> None:
        """Runs that a lost call made after all."""
        for run in self._runs(f"tags.mlflow.parentRunId = '{self.parent_id}'"):
            trial = trials.get(run.data.tags.get("key", ""))
            if trial is not None and trial.run_id not in (None, run.info.run_id):
                self.client.delete_run(run.info.run_id)

    def _inputs(self) -> list[Any]:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        return [
            DatasetInput(Dataset(**dataset), [InputTag("mlflow.data.context", context)])
            for context, dataset in data_inputs(self.header)
        ]

    def _end_abandoned_runs(self) -> None:
        """Runs whose driver was killed hard stay RUNNING for ever: end those of this host whose process is gone."""
        import psutil

        for run in self._runs(f"attributes.status = 'RUNNING' and tags.host = '{socket.gethostname()}'"):
            if not psutil.pid_exists(int(run.data.tags.get("pid", os.getpid()))):
                self.client.set_terminated(run.info.run_id, "KILLED")


def _floats(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value is not None}


def _now() -> int:
    return int(time.time() * 1000)


def _written(folder: Path) -> int | None:
    """When a trial's result was written, in ms."""
    file = folder / "result.json"
    return int(file.stat().st_mtime * 1000) if file.is_file() else None


def _begun(folder: Path) -> int | None:
    """When a trial's first row was written, in ms."""
    rows, _ = read_rows(folder / "metrics.jsonl")
    return int(rows[0]["time"] * 1000) if rows else None
