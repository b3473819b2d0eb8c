"""Making the runs of an MLflow store equal to what lies on disk; whatever MLflow raises is raised here.

What is there is asked of the store, by tags, and never remembered beside it. After any failure what was seen is
forgotten and asked again, since a call whose answer was lost may have been carried out: so each run is made once, and
each point of a curve logged once (MLflow knows the last step of each curve).
"""

from __future__ import annotations

import contextlib
import gc
import getpass
import logging
import math
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from ablations.track.curves import CurveFile, MetricPoint, metric_name
from ablations.track.location import Location
from ablations.track.mlflow_model import SavedModel, log_model
from ablations.track.pictures import draw_samples
from iris.io.hashing import digest

ENDED = ("FINISHED", "FAILED", "KILLED")
STAMP = "artifacts"  # tag: digest of the sizes and times of the files that the run has
ENTITIES, PARAMS, TAGS = 1000, 100, 100  # MLflow's own limits of a call (mlflow/utils/validation.py),
PARAM_LENGTH, TAG_LENGTH = 6000, 5000  # and of a value
RUNS_PER_PAGE = 100  # a sqlite store needs about 0.2 MB of memory for each while it looks them up
# What must be in place before MLflow is imported; whatever the user set stays.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nothing leaves the machine unasked
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # what fails is raised, and told in one line
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",  # else each model gets a copy of uv.lock
    # What tries again looks first at what the lost call has done; MLflow would repeat it blindly.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "PGCONNECT_TIMEOUT": "15",
}


@dataclass(frozen=True, kw_only=True)
class RunContent:
    """What a run is to hold.

    Attributes:
        mark: the tag by which it is found again, and its value.
        status: RUNNING, FINISHED, FAILED or KILLED.
        tags: one of None is removed.
        curves: metrics.jsonl -> prefix of the names of its curves.
        values: measures, at step 0, where MLflow's charts draw bars across runs.
        inputs: (context, arguments of mlflow.entities.Dataset).
        files: path among the artifacts -> file, if it is there.
        samples: a samples.npz, drawn as pictures.
        written: when its results were written, in ms; None: now.
    """

    mark: tuple[str, str]
    name: str
    status: str
    tags: Mapping[str, str | None]
    params: Mapping[str, str]
    curves: Mapping[Path, str] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    inputs: Sequence[tuple[str, dict[str, str]]] = ()
    files: Mapping[str, Path] = field(default_factory=dict)
    samples: Path | None = None
    model: SavedModel | None = None
    written: int | None = None

    def stamps(self) -> dict[str, tuple[int, int]]:
        """Size and time of each file that is there."""
        files = dict(self.files)
        files |= {"samples": self.samples} if self.samples else {}
        files |= {f"model/{name}": file for name, file in self.model.files().items()} if self.model else {}
        states = {name: path.stat() for name, path in sorted(files.items()) if path.is_file()}
        return {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()}


class Store:
    """A tracking store; it is connected to when it is first asked for runs.

    Args:
        say: called with what a person should know.
    """

    def __init__(self, location: Location, say: Callable[[str], None] = print) -> None:
        self.location, self._say = location, say
        self._client: Any = None
        self._experiments: dict[str, str] = {}

    def runs(self, experiment: str) -> Runs:
        """The runs of an experiment, which is made when it is not there."""
        file = self.location.file
        # Processes that meet on a missing sqlite file leave it without a part of its tables.
        with FileLock(f"{file}.lock") if file else contextlib.nullcontext():
            if self._client is None:
                self._client = _connected(self.location.uri, file)
            if experiment not in self._experiments:
                self._experiments[experiment] = self._experiment(experiment)
        return Runs(self._client, self._experiments[experiment])

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name, artifact_location=self.location.artifacts(name))
            except MlflowException:  # another process made it, or an answer was lost
                if (found := self._client.get_experiment_by_name(name)) is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
            self._say(f"The experiment {name} was deleted in MLflow; it is restored, with the runs that it had.")
        return found.experiment_id


class Runs:
    """Runs of one experiment, as far as they were looked for; dropped after a failure."""

    def __init__(self, client: Any, experiment_id: str) -> None:
        self._client, self._experiment_id = client, experiment_id
        self._known: dict[tuple[str, str], _Known] = {}

    def find(self, tag: str, value: str, by: str = "") -> bool:
        """Look for runs marked by ``tag`` whose tag ``by`` (default: the same one) has this value; whether any is there.

        Runs that were not looked for are made. Of several with one mark, which were made by calls whose answers were
        lost, a finished or else the oldest one is kept.
        """
        found = [run for run in self._search(f"tags.{by or tag} = '{value}'") if tag in run.data.tags]
        for run in sorted(found, key=lambda run: run.info.status != "FINISHED"):
            mark = tag, run.data.tags[tag]
            if mark in self._known:
                self._client.delete_run(run.info.run_id)
            else:
                self._known[mark] = _Known(run)
        return bool(found)

    def open(self, content: RunContent) -> str:
        """The run's id; it is made when it is not there."""
        known = self._known.setdefault(content.mark, _Known())
        if not known.run_id:
            self._make(known, content, [])
        return known.run_id

    def bring(self, content: RunContent) -> int:
        """Make a run equal to its content; returns the number of points of curves that were missing."""
        known = self._known.setdefault(content.mark, _Known())
        points, stamps, ended = known.read(content.curves), content.stamps(), content.status in ENDED
        stamp = {STAMP: digest(stamps)} if ended and stamps else {}
        if not known.run_id:
            self._make(known, replace(content, tags={**content.tags, **stamp}), points)
        if stamp and known.status in ENDED and known.tags.get(STAMP) == stamp[STAMP]:
            known.files = stamps  # a status of the end is set last: with it, the files of the stamp are there
        if known.status in ENDED and (not ended or known.files != stamps):
            self._client.update_run(known.run_id, status="RUNNING")
            known.status = "RUNNING"
        points = [point for point in points if point.step > known.steps.get(point.name, -1)]
        self._log(known, [*points, *known.new_values(content)], content.params, {**content.tags, **stamp})
        self._log_inputs(known, content.inputs)
        if known.files != stamps:
            self._send_files(known, content, stamps)
        if known.status != content.status:
            self._client.set_terminated(known.run_id, content.status, end_time=content.written)
            known.status = content.status
        return len(points)

    def _make(self, known: _Known, content: RunContent, points: Sequence[MetricPoint]) -> None:
        tags = {name: value for name, value in content.tags.items() if value is not None} | dict([content.mark])
        tags |= {"host": socket.gethostname(), "mlflow.user": _user(), "mlflow.source.type": "LOCAL"}
        begun = points[0].time_ms if points else None
        known.take(self._client.create_run(self._experiment_id, begun, _short(tags), content.name))

    def _log(
        self, known: _Known, points: list[MetricPoint], params: Mapping[str, str], tags: Mapping[str, str | None]
    ) -> None:
        """What is missing of these, in as few calls as MLflow allows."""
        from mlflow.entities import Metric, Param, RunTag

        set_tags = _short({name: value for name, value in tags.items() if value is not None})
        set_tags = [RunTag(name, value) for name, value in set_tags.items() if known.tags.get(name) != value]
        params = [Param(name, value[:PARAM_LENGTH]) for name, value in params.items() if name not in known.params]
        metrics = [Metric(*point) for point in points]
        while metrics or params or set_tags:
            room = ENTITIES - len(params[:PARAMS]) - len(set_tags[:TAGS])
            self._client.log_batch(known.run_id, metrics[:room], params[:PARAMS], set_tags[:TAGS])
            known.note(metrics[:room], params[:PARAMS], set_tags[:TAGS])
            metrics, params, set_tags = metrics[room:], params[PARAMS:], set_tags[TAGS:]
        for name in [name for name, value in tags.items() if value is None and name in known.tags]:
            self._client.delete_tag(known.run_id, name)
            del known.tags[name]

    def _log_inputs(self, known: _Known, inputs: Sequence[tuple[str, dict[str, str]]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if inputs and not known.inputs:
            datasets = [
                DatasetInput(Dataset(**data), [InputTag("mlflow.data.context", context)]) for context, data in inputs
            ]
            self._client.log_inputs(known.run_id, datasets=datasets)
            known.inputs = True

    def _send_files(self, known: _Known, content: RunContent, stamps: Mapping[str, tuple[int, int]]) -> None:
        """Files and pictures that were not sent, in one call, and the model."""
        with tempfile.TemporaryDirectory() as folder:
            for name, file in content.files.items():
                if name in stamps and known.files.get(name) != stamps[name]:
                    place = Path(folder) / name
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.symlink_to(file.absolute())
            if content.samples is not None:
                draw_samples(content.samples, Path(folder), known.run_id, known.step, content.written or 0)
            self._client.log_artifacts(known.run_id, folder)
        if content.model is not None:
            log_model(self._client, self._experiment_id, known.run_id, content.model)
        known.files = dict(stamps)

    def _search(self, filter_string: str) -> Iterator[Any]:
        """All runs that a filter finds, the oldest first."""
        token, order = None, ["start_time ASC"]
        while token != "":
            page = self._client.search_runs(
                [self._experiment_id], filter_string, order_by=order, max_results=RUNS_PER_PAGE, page_token=token
            )
            yield from page
            token = page.token or ""


class _Known:
    """What is known to be in a run."""

    def __init__(self, run: Any = None) -> None:
        self.run_id, self.status = "", ""
        self.files: dict[str, tuple[int, int]] = {}
        self._curves: dict[Path, CurveFile] = {}
        if run is not None:
            self.take(run)

    def take(self, run: Any) -> None:
        """All that a run of MLflow says."""
        self.run_id, self.status = run.info.run_id, run.info.status
        self.params, self.tags, self.values = set(run.data.params), dict(run.data.tags), dict(run.data.metrics)
        # The entity has the last value of each metric, and only its protocol buffer the step of that.
        self.steps = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        self.inputs = bool(run.inputs and run.inputs.dataset_inputs)

    def note(self, metrics: Sequence[Any], params: Sequence[Any], tags: Sequence[Any]) -> None:
        """All that a call has logged."""
        self.values |= {metric.key: metric.value for metric in metrics}
        self.steps |= {metric.key: metric.step for metric in metrics}
        self.params |= {param.key for param in params}
        self.tags |= {tag.key: tag.value for tag in tags}

    def read(self, curves: Mapping[Path, str]) -> list[MetricPoint]:
        """The points that are new in the files."""
        for file, prefix in curves.items():
            self._curves.setdefault(file, CurveFile(file, prefix))
        return [point for file in curves for point in self._curves[file].read()]

    @property
    def step(self) -> int:
        """The last one of its curves."""
        return max((curve.step for curve in self._curves.values()), default=0)

    def new_values(self, content: RunContent) -> list[MetricPoint]:
        """Measures that are not there; one whose name a curve has is named "…_final"."""
        curves = set().union(*(curve.names for curve in self._curves.values()))
        now, found = int(time.time() * 1000), []
        for name, value in content.values.items():
            name = metric_name(name)
            name = f"{name}_final" if name in curves else name
            there = self.values.get(name)
            if there is None:  # a fixed time, so that a call that is repeated adds nothing
                found.append(MetricPoint(name, value, content.written or now, 0))
            elif there != value and not (math.isnan(there) and math.isnan(value)):
                found.append(MetricPoint(name, value, now, 0))  # the later one is the last one
        return found


def _connected(uri: str, file: Path | None) -> Any:
    """A client of the store, whose tables are made where it is a file that is missing."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    from mlflow import MlflowClient

    gc.freeze()  # looking through MLflow's own objects again and again takes a tenth of the time
    if file and not file.exists():
        # Made beside and renamed: a kill between its tables leaves what MLflow never opens again. MLflow keeps what it
        # knows of a name for as long as the process lives.
        for left in file.parent.glob(f".{file.name}.new*"):
            left.unlink()
        new = file.with_name(f".{file.name}.new{time.time_ns()}")
        MlflowClient(tracking_uri=f"sqlite:///{new}").search_experiments(max_results=1)
        new.replace(file)
    return MlflowClient(tracking_uri=uri)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"


def _short(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags cut to the length that MLflow takes."""
    return {name: value[:TAG_LENGTH] for name, value in tags.items()}
