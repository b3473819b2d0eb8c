"""A training's metrics.jsonl as points of MLflow's curves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

NO_CURVES = ("step", "steps", "time")


class MetricPoint(NamedTuple):
    """One value of one curve, in the order of mlflow.entities.Metric."""

    name: str
    value: float
    time_ms: int
    step: int


class CurveFile:
    """Reads what is new of a metrics.jsonl.

    Rows whose step does not increase are left out: a loop that resumes replaces the file by what its checkpoint holds
    and repeats the same numbers (a resumed training equals one never stopped); and two writers meet for a moment when
    a requeued trial starts before its first process is dead.

    Args:
        file: rows of a loop.
        prefix: of the names of its curves.

    Attributes:
        names: of the curves read so far.
        step: of the last row read; -1: none.
    """

    def __init__(self, file: Path, prefix: str = "") -> None:
        self.file, self.prefix = file, prefix
        self.names: set[str] = set()
        self.step = -1
        self._offset = 0
        self._line = b""  # the last one has its time, so it tells whether the file is still the one that was read

    def read(self) -> list[MetricPoint]:
        """The points of the rows that are new; a half-written last line is left for the next time."""
        points = [point for row in self._rows(self._text()) for point in self._points(row)]
        self.names.update(point.name for point in points)
        return points

    def _text(self) -> bytes:
        try:
            with open(self.file, "rb") as stream:
                stream.seek(self._offset - len(self._line))
                text = stream.read()
                if not text.startswith(self._line):
                    self._offset, self._line, self.step = 0, b"", -1
                    stream.seek(0)
                    text = stream.read()
        except FileNotFoundError:
            return b""
        text = text[len(self._line) : text.rfind(b"\n") + 1]
        self._offset += len(text)
        self._line = text.splitlines(keepends=True)[-1] if text else self._line
        return text

    def _rows(self, text: bytes) -> Iterator[dict[str, Any]]:
        for line in text.splitlines():
            try:
                row = json.loads(line)
                step, _ = int(row["step"]), float(row["time"])
            except (ValueError, KeyError, TypeError):
                continue
            if step > self.step:
                self.step = step
                yield row

    def _points(self, row: dict[str, Any]) -> list[MetricPoint]:
        time_ms, step = int(row["time"] * 1000), int(row["step"])
        return [
            MetricPoint(metric_name(f"{self.prefix}{name}"), float(value), time_ms, step)
            for name, value in row.items()
            if name not in NO_CURVES and isinstance(value, int | float) and not isinstance(value, bool)
        ]


def begun(file: Path) -> int | None:
    """When the first row of a metrics.jsonl was written, in ms."""
    try:
        with open(file, "rb") as stream:
            return int(json.loads(stream.readline())["time"] * 1000)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def metric_name(text: str) -> str:
    """``text`` with what MLflow does not allow in a name (it allows letters, digits, ``_ - . / :`` and space) as _."""
    return re.sub(r"[^\w\-./: ]", "_", text)
