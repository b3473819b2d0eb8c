"""What MLflow is to know of a grid, on disk: so that it can be told later, or told to another store.

A file a grid, ``runs_dir/tracking/<grid>-<digest of its trials' keys>.jsonl``: the grid and its trials as planned, each
trial as it began and ended, the grid as it ended. Curves, samples and weights stay where they are made. Only what is new
is appended; of each kind the last line counts. Nothing in it depends on where the runs folder lies.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ablations.answer.records import GridOutcome, PlannedTrial, TrialRecord, measures_of
from iris.io.files import read_json
from iris.io.hashing import digest

FOLDER, TRIALS = "tracking", "trials"
FACTS = ("state", "cached", "metrics", "seconds", "environment", "error")
RELATIVE = ("wall_seconds", "cached")  # what is true of one invocation only, and makes no new line


class Journal:
    """A grid's file. One driver writes it, alone; whoever tells MLflow reads it.

    Args:
        path: of the file, in ``FOLDER`` of the runs folder.

    Attributes:
        key: names the grid in MLflow.
        trials: as planned.
        lines: the last of each kind, the newest last.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.runs, self.key = path, path.parent.parent, path.stem
        self.trials: list[PlannedTrial] = []
        self.lines: dict[str, dict[str, Any]] = {}
        self._read = 0  # bytes
        self._torn = False  # the file ends in a line that a kill cut off
        self._lock = FileLock(path.with_suffix(".lock"), thread_local=False)

    @classmethod
    def of(cls, runs: Path, experiment: str, keys: Sequence[str]) -> Journal:
        """The journal of the grid that has these trials."""
        return cls(Path(runs) / FOLDER / f"{experiment}-{digest(sorted(keys))}.jsonl")

    def acquire(self) -> bool:
        """Become the grid's only driver that writes, and read what is there; False while another one is it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        self.read()
        return True

    def release(self) -> None:
        """Let others write."""
        self._lock.release(force=True)

    def plan(self, header: GridOutcome, trials: Sequence[PlannedTrial], params: Mapping[str, str]) -> None:
        """The grid as planned; the header's records are not read."""
        self._append("grid", False, header=_header(header), params=params, trials=[vars(trial) for trial in trials])

    def began(self, key: str) -> None:
        """A trial runs, for the first time or again."""
        self._append(f"trial {key}", self._newest == "end", state="running")

    def ended(self, record: TrialRecord) -> None:
        """How a trial ended."""
        facts = {name: getattr(record, name) for name in FACTS}
        if record.error and record.error.get("log"):
            facts["error"] = record.error | {"log": os.path.relpath(record.error["log"], self.runs)}
        self._append(f"trial {record.key}", False, **facts)

    def closed(self, outcome: GridOutcome | None, report: Path | None, status: str, verdict: str | None) -> None:
        """How the grid ended."""
        facts = {"header": outcome and _header(outcome), "report": report and os.path.relpath(report, self.runs)}
        self._append("end", self._newest != "end", **facts, status=status, verdict=verdict)

    def left(self) -> None:
        """The driver leaves what runs; what had ended has ended."""
        if not self.end:
            self._append("end", True, status="RUNNING")

    def _append(self, kind: str, again: bool, **facts: Any) -> None:
        """A line, if it says something new; or ``again``, if it has happened once more."""
        event = json.loads(json.dumps({"kind": kind, **facts}, default=str))
        if again or _lasting(event) != _lasting(self.lines.get(kind)):
            line = "\n" * self._torn + json.dumps(event) + "\n"
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
            self.read()

    def read(self) -> Journal:
        """Read what is new in the file; a line that a kill cut off is no line. Returns itself."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._read)
                text = file.read()
        except FileNotFoundError:
            return self
        self._torn = bool(text) and not text.endswith(b"\n")
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            try:
                event = json.loads(line)
                if event["kind"] == "grid":
                    self.trials = [PlannedTrial(**one | {"curves": tuple(one["curves"])}) for one in event["trials"]]
            except (ValueError, KeyError, TypeError):
                continue
            self.lines.pop(event["kind"], None)
            self.lines[event["kind"]] = event
        return self

    @property
    def end(self) -> dict[str, Any]:
        """What ``closed`` was told ({"status": "RUNNING"}: the driver left), unless something came after it; or {}."""
        return self.lines["end"] if self._newest == "end" else {}

    @property
    def header(self) -> dict[str, Any]:
        """The fields of the grid's GridOutcome, but for the records."""
        return self.end.get("header") or self.lines["grid"]["header"]

    def running(self, trial: PlannedTrial) -> bool:
        """Whether a trial began, as written here, or as its curves say."""
        return f"trial {trial.key}" in self.lines or any((self.runs / file).exists() for file in trial.curves)

    def facts(self, trial: PlannedTrial) -> dict[str, Any] | None:
        """How a trial ended, as written here, or, if the driver did not live to, as its folder says; None: not yet."""
        line, folder = self.lines.get(f"trial {trial.key}", {}), self.runs / TRIALS / trial.key
        state = line.get("state")
        known = state == "done" or (state == "failed" and not (folder / "result.json").exists())
        return line if known else _facts_of(folder)

    def absolute(self, path: str) -> Path:
        """A path that was written here."""
        return Path(os.path.normpath(self.runs / path))

    @property
    def _newest(self) -> str:
        return next(reversed(self.lines), "")


def journals(runs: Path) -> list[Journal]:
    """Every grid of a runs folder, the oldest first."""
    found = sorted((runs / FOLDER).glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
    return [journal for path in found if (journal := Journal(path).read()).trials]


def _facts_of(folder: Path) -> dict[str, Any] | None:
    result, error = read_json(folder / "result.json"), read_json(folder / "error.json")
    if result is None and error is None:
        return None
    known = {name: (result or {}).get(name, {}) for name in ("seconds", "environment")} | {
        "metrics": measures_of(result or {})
    }
    ended = {"state": "failed", "error": error} if result is None else {"state": "done", "error": None}
    return known | ended | {"cached": True}


def _header(outcome: GridOutcome) -> dict[str, Any]:
    return {name: value for name, value in asdict(replace(outcome, records=[])).items() if name != "records"}


def _lasting(event: Any) -> str:
    """What must differ for an event to be a new one. As text: nan is not equal to itself."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: kept(inner) for name, inner in value.items() if name not in RELATIVE}
        return value

    return json.dumps(kept(event), sort_keys=True)
