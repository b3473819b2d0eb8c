"""A training's metrics.jsonl as curves in MLflow: each point once, whatever the server, the training or this process
lives through.

No offset of what was sent is kept on disk: a call whose answer was lost may or may not have been carried out, so after
any trouble the store is asked for the last step of each curve. A call that is carried out even later is no trouble
either: its points carry the times of the file, and MLflow stores equal (name, value, time, step) of a run once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

METRICS_PER_BATCH = 1000  # MLflow's own limit
NO_CURVES = ("step", "steps", "time")


class MetricPoint(NamedTuple):
    """One value of one curve, in the order of mlflow.entities.Metric."""

    name: str
    value: float
    time_ms: int
    step: int


class Place(NamedTuple):
    """How far a file was read: the bytes, the last line and its step."""

    offset: int = 0
    line: bytes = b""  # has the time, so it tells whether the file is still the one that was read
    step: int = -1


class Curves:
    """What of a metrics.jsonl is in a run.

    Args:
        file: rows of a loop, which appends to it or, resumed, replaces it by what its checkpoint holds. The steps it
            then repeats are the same numbers again (a resumed training equals one never stopped), and are not sent
            again.
        fresh: the run has no metrics yet.
    """

    def __init__(self, file: Path, fresh: bool = False) -> None:
        self.file, self._fresh = file, fresh
        self._place = Place()
        self._last: dict[str, int] = {}  # the last step of each curve in the store, where it is known

    def send(self, client: Any, run_id: str) -> int:
        """Log what the run does not have; returns the number of points. Raises what MLflow raises; nothing is lost."""
        rows, place = read_rows(self.file, self._place)
        try:
            sent = sum(self._log(client, run_id, batch) for batch in _batches(map(metric_points, rows)))
        except Exception:
            self._last, self._fresh = {}, False
            raise
        self._place = place
        return sent

    def names(self) -> set[str]:
        """The curves of the file."""
        return {point.name for row in read_rows(self.file)[0] for point in metric_points(row)}

    @property
    def step(self) -> int:
        """The last step that is in the store; -1: none, or it must be asked first."""
        return max(self._last.values(), default=-1)

    def _log(self, client: Any, run_id: str, points: list[MetricPoint]) -> int:
        from mlflow.entities import Metric

        for name in {point.name for point in points} - self._last.keys():
            history = [] if self._fresh else client.get_metric_history(run_id, name)
            self._last[name] = max((metric.step for metric in history), default=-1)
        missing = [point for point in points if point.step > self._last[point.name]]
        if missing:
            client.log_batch(run_id, metrics=[Metric(*point) for point in missing])
            self._last |= {point.name: point.step for point in missing}  # in the order of their steps
        return len(missing)


def read_rows(file: Path, place: Place = Place()) -> tuple[list[dict[str, Any]], Place]:
    """The rows after ``place``, and the place after them; a half-written last line is left for the next time.

    Rows whose step does not increase are left out: they are the trace of two writers meeting for a moment when a
    requeued trial starts before its first process is dead.
    """
    try:
        with open(file, "rb") as stream:
            stream.seek(place.offset - len(place.line))
            text = stream.read()
            if not text.startswith(place.line):
                place = Place()
                stream.seek(0)
                text = stream.read()
    except FileNotFoundError:
        return [], Place()
    text = text[len(place.line) : text.rfind(b"\n") + 1]
    rows, last = [], place.step
    for line in text.splitlines():
        try:
            row = json.loads(line)
            step, _ = int(row["step"]), float(row["time"])
        except (ValueError, KeyError, TypeError):
            continue
        if step > last:
            rows.append(row)
            last = step
    line = text.splitlines(keepends=True)[-1] if text else place.line
    return rows, Place(place.offset + len(text), line, last)


def metric_points(row: Mapping[str, Any]) -> list[MetricPoint]:
    """The point of each curve of a row."""
    time_ms, step = int(row["time"] * 1000), int(row["step"])
    return [
        MetricPoint(metric_name(name), float(value), time_ms, step)
        for name, value in row.items()
        if name not in NO_CURVES and isinstance(value, int | float) and not isinstance(value, bool)
    ]


def metric_name(text: str) -> str:
    """``text`` with what MLflow does not allow in a name (it allows letters, digits, ``_ - . / :`` and space) as _."""
    return re.sub(r"[^\w\-./: ]", "_", text)


def _batches(rows: Iterable[list[MetricPoint]]) -> Iterator[list[MetricPoint]]:
    """Whole rows in each call, as far as they fit: a call is carried out whole or not at all."""
    batch: list[MetricPoint] = []
    for row in rows:
        if len(batch) + len(row) > METRICS_PER_BATCH and batch:
            yield batch
            batch = []
        batch += row
        while len(batch) > METRICS_PER_BATCH:
            yield batch[:METRICS_PER_BATCH]
            batch = batch[METRICS_PER_BATCH:]
    if batch:
        yield batch
