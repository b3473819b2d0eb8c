"""The work that MLflow is told of, as it lies on disk: a stage of training, an evaluation, or a grid (grid.py).

Each can be brought up at any time, by anyone, after any kill, whatever a store has of it: only what is missing is sent.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from ablations.track.location import unreachable
from ablations.track.store import RunContent, Runs, Store
from iris.io.files import read_json, write_json
from iris.io.follower import MARK
from iris.io.hashing import file_sha256
from iris.settings import flatten

RESULTS = "results.json"
RESULT_FILES = (RESULTS, "per_image.csv", "report.md", "index.html", "duplicates.html")


class Work(ABC):
    """What lies at ``place``, which is to be a run of an experiment, perhaps with child runs.

    Attributes:
        rest: how what the store does not have gets there, for messages.
        lock: who holds it tells of the work, alone, as long as the work may go on.
        points: of curves, that were sent.
        problems: what the store did not take, and why.
        told: it has all that there was at the last look.
    """

    experiment: str
    rest = "the same command, or python -m ablations sync, sends the rest without training once MLflow answers."

    def __init__(self, place: Path, lock: Path) -> None:
        self.place, self.name, self.points, self.told = place, place.stem, 0, False
        self.lock = FileLock(lock, thread_local=False)
        self.problems: dict[str, Exception] = {}
        self._runs: Runs | None = None

    def sync(self, store: Store, alive: bool) -> None:
        """Bring the store up to what lies there. Called again, it goes on with what is missing.

        Args:
            alive: somebody works on it; else what has no end was killed.

        Raises what MLflow raises when the store cannot be reached; what it raises of one child run is a problem.
        """
        self.problems, self.told = {}, False
        try:
            self._sync(store, self.content(alive))
            self.told = not self.problems
        finally:
            if not self.told:
                self.forget()

    def forget(self) -> None:
        """Ask the store anew what it has: an answer was lost."""
        self._runs = None

    def _sync(self, store: Store, content: RunContent) -> None:
        if self._runs is None:
            self._runs = store.runs(self.experiment)
            if self._runs.find(*content.mark):
                self._runs.find("key", self._runs.open(content), by="mlflow.parentRunId")
        for name, child in self.children(self._runs.open(content), content.status):
            try:
                self.points += self._runs.bring(child)
            except Exception as error:
                if unreachable(error):
                    raise
                self.problems[name] = error
        self.points += self._runs.bring(content)

    @abstractmethod
    def content(self, alive: bool) -> RunContent:
        """What its run is to hold."""

    def children(self, parent_id: str, status: str) -> Iterator[tuple[str, RunContent]]:
        """Names of its child runs, and what they are to hold that they did not yet; ``status`` is the parent's."""
        yield from ()

    @property
    def has(self) -> str:
        """What the store has so far, in words."""
        return f"all of {self.name}" if self.told else f"not all of {self.name}"


class Stage(Work):
    """A stage of ``iris.training``: its settings, curves and pictures."""

    experiment = "training"

    def __init__(self, place: Path) -> None:
        super().__init__(place, place / ".tracking.lock")

    def content(self, alive: bool) -> RunContent:
        settings = (read_json(self.place / "settings.json") or {}) | (read_json(self.place / MARK) or {})
        settings.pop("sent", None)
        return RunContent(
            mark=("stage_key", self.place.name),
            name=self.place.name,
            status=self._status(alive),
            tags={"kind": "stage", "stage": self.place.name.partition("-")[0], "mlflow.source.name": "iris.training"},
            params=as_params(settings | {"key": self.place.name}),
            curves={self.place / "metrics.jsonl": ""},
            files={f"pictures/{path.name}": path for path in self.place.glob("pictures/[!.]*.png")},
        )

    def _sync(self, store: Store, content: RunContent) -> None:
        super()._sync(store, content)
        mark = read_json(self.place / MARK) or {}
        if content.status == "FINISHED" and not mark.get("sent"):
            write_json(self.place / MARK, mark | {"sent": True})

    def _status(self, alive: bool) -> str:
        for file, status in {"result.json": "FINISHED", "error.json": "FAILED"}.items():
            if (self.place / file).exists():
                return status
        return "RUNNING" if alive else "KILLED"


class Evaluation(Work):
    """The results of ``python -m eval``: the numbers, their errors, the settings and the files."""

    experiment = "evaluation"

    def __init__(self, place: Path) -> None:
        super().__init__(place, place / ".tracking.lock")
        self.rest = f"the results are in {place}."

    def content(self, alive: bool) -> RunContent:
        results = json.loads((self.place / RESULTS).read_text())
        values = {f"seconds/{name}": seconds for name, seconds in results["seconds"].items()}
        for name, number in results["numbers"].items():
            base, mark, rest = name.partition("/")
            for end, part in {"": "value", "_se": "standard_error", "_low": "low", "_high": "high"}.items():
                values[f"{base}{end}{mark}{rest}"] = number[part]
        return RunContent(
            mark=("results_sha256", file_sha256(self.place / RESULTS)),
            name=results["name"],
            status="FINISHED",
            tags=evaluation_tags(results),
            params=as_params(results["settings"]),
            values=numbers(values),
            files={name: self.place / name for name in RESULT_FILES},
            written=int(datetime.fromisoformat(results["created"]).timestamp() * 1000),
        )


def evaluation_tags(results: Mapping[str, Any]) -> dict[str, str]:
    """What was measured, on what, and by what."""
    model = results["model"]
    about = {"model": model["path"], "model_kind": model["kind"], "model_fingerprint": model["fingerprint"]}
    about |= {"kind": "evaluation", "command": results["command"], "mlflow.source.name": "eval"}
    return data_tags(results["data"], results["judge"]) | as_params(about | {"hardware": results["hardware"]})


def data_tags(data: Mapping[str, Any], judge: Mapping[str, Any]) -> dict[str, str]:
    """Tags by which runs on the same data and by the same judge are found."""
    return {
        "judge": str(judge.get("name", "none")),
        "judge_sha256": str(judge.get("sha256", "")),
        "data": str(data.get("name", "")),
        "data_fingerprint": str(data.get("fingerprint", "")),
    }


def as_params(settings: Mapping[str, Any]) -> dict[str, str]:
    """Nested settings as dotted names to text: ``{"model": {"dim": 64}}`` -> ``{"model.dim": "64"}``."""
    return {
        name: json.dumps(value, default=str) if isinstance(value, list) else str(value)
        for name, value in flatten(dict(settings)).items()
    }


def numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    """The values that are there."""
    return {name: float(value) for name, value in values.items() if value is not None}
