"""What MLflow is to know of a grid, on disk: so that it can be told later, or told to another store.

A file a grid, ``runs_dir/tracking/<grid>-<digest of its trials' keys>.jsonl``: the grid and its trials as planned, each
trial as it began and ended, the grid as it ended. Curves, samples and weights stay in the trials' folders. Only what is
new is appended; of each kind the last line counts. Nothing in it depends on where the runs folder lies.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ablations.answer.records import GridOutcome, PlannedTrial, TrialRecord
from iris.io.files import read_json
from iris.io.hashing import digest

FOLDER, TRIALS, LOCK = "tracking", "trials", ".lock"
FACTS = ("state", "cached", "metrics", "seconds", "environment", "error")
RELATIVE = ("wall_seconds", "cached")  # what is true of one invocation only, and makes no new line
PLANNED = tuple(field.name for field in fields(PlannedTrial))


class Journal:
    """A grid's file. One driver writes it, alone; whoever tells MLflow reads it.

    Args:
        path: of the file, in ``FOLDER`` of the runs folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.runs = path, path.parent.parent
        self.trials: list[PlannedTrial] = []
        self._lines: dict[str, dict[str, Any]] = {}  # the last of each kind, the newest last
        self._read = 0  # bytes
        self._torn = False  # the file ends in a line that a kill cut off
        self._lock = FileLock(path.with_suffix(LOCK), thread_local=False)

    @classmethod
    def of(cls, runs: Path, experiment: str, keys: Sequence[str]) -> Journal:
        """The journal of the grid that has these trials."""
        return cls(Path(runs) / FOLDER / f"{experiment}-{digest(sorted(keys))}.jsonl")

    @property
    def key(self) -> str:
        """Names the grid in MLflow."""
        return self.path.stem

    # -- writing --------------------------------------------------------------------------------------------------

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
        planned = [_fields(trial, PLANNED) for trial in trials]
        self._append("grid", False, header=_header(header), params=dict(params), trials=planned)

    def began(self, key: str) -> None:
        """A trial runs, for the first time or again."""
        self._append(f"trial {key}", self._newest == "end", state="running")

    def ended(self, record: TrialRecord) -> None:
        """How a trial ended."""
        facts = _fields(record, FACTS)
        if record.error and record.error.get("log"):
            facts["error"] = record.error | {"log": os.path.relpath(record.error["log"], self.runs)}
        self._append(f"trial {record.key}", False, **facts)

    def closed(self, outcome: GridOutcome | None, report: Path | None, status: str, verdict: str | None) -> None:
        """How the grid ended."""
        header, report = outcome and _header(outcome), report and os.path.relpath(report, self.runs)
        facts = {"header": header, "report": report, "status": status, "verdict": verdict}
        self._append("end", self._newest != "end", **facts)

    def left(self) -> None:
        """The driver leaves what runs; what had ended has ended."""
        if self.status is None:
            self._append("end", True, status="RUNNING")

    def _append(self, kind: str, again: bool, **facts: Any) -> None:
        """A line, if it says something new; or ``again``, if it has happened once more."""
        event = json.loads(json.dumps({"kind": kind, **facts}, default=str))
        if not again and _lasting(event) == _lasting(self._lines.get(kind)):
            return
        line = "\n" * self._torn + json.dumps(event) + "\n"
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line)
        self.read()

    # -- reading --------------------------------------------------------------------------------------------------

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
                kind = event["kind"]
                if kind == "grid":
                    self.trials = [PlannedTrial(**one | {"curves": tuple(one["curves"])}) for one in event["trials"]]
            except (ValueError, KeyError, TypeError):
                continue
            self._lines.pop(kind, None)
            self._lines[kind] = event
        return self

    @property
    def planned(self) -> bool:
        """Whether it says what the grid is."""
        return "grid" in self._lines

    @property
    def params(self) -> dict[str, str]:
        """Of the grid's run."""
        return self._lines["grid"]["params"]

    @property
    def end(self) -> dict[str, Any]:
        """{"status", "verdict", "report": a folder or None, …} of a grid that has ended and did not go on since; or {}."""
        end = self._lines["end"] if self._newest == "end" else {}
        return end | {"report": self._absolute(end["report"])} if end.get("report") else end

    @property
    def status(self) -> str | None:
        """FINISHED, FAILED or KILLED; RUNNING: its driver left it; None: it has not ended, or its driver was killed."""
        return self.end.get("status")

    def header(self) -> GridOutcome:
        """The grid, without records."""
        return GridOutcome(**(self.end.get("header") or self._lines["grid"]["header"]), records=[])

    def outcome(self) -> GridOutcome:
        """The grid and the trials that ended, with folders as they lie now."""
        found = [(trial, self.facts(trial)) for trial in self.trials]
        return replace(self.header(), records=[self.record(trial, facts) for trial, facts in found if facts])

    def running(self, trial: PlannedTrial) -> bool:
        """Whether a trial began, as written here, or as its curves say."""
        line = self._lines.get(f"trial {trial.key}", {})
        return line.get("state") == "running" or any((self.runs / file).exists() for file in trial.curves)

    def facts(self, trial: PlannedTrial) -> dict[str, Any] | None:
        """How a trial ended, as written here, or, if the driver did not live to, as its folder says; None: not yet."""
        line, folder = self._lines.get(f"trial {trial.key}", {}), self.runs / TRIALS / trial.key
        state = line.get("state")
        known = state == "done" or (state == "failed" and not (folder / "result.json").exists())
        return line if known else _facts_of(folder)

    def record(self, trial: PlannedTrial, facts: Mapping[str, Any]) -> TrialRecord:
        """A trial and its ``facts``, with folders as they lie now."""
        facts = {name: facts[name] for name in FACTS}
        if facts["error"] and facts["error"].get("log"):
            facts["error"] = facts["error"] | {"log": str(self._absolute(facts["error"]["log"]))}
        return TrialRecord(**_fields(trial, PLANNED), **facts, folder=self.runs / TRIALS / trial.key)

    @property
    def _newest(self) -> str:
        return next(reversed(self._lines), "")

    def _absolute(self, path: str) -> Path:
        return Path(os.path.normpath(self.runs / path))


def journals(runs: Path) -> list[Journal]:
    """Every grid of a runs folder, the oldest first."""
    found = sorted((Path(runs) / FOLDER).glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
    return [Journal(path).read() for path in found]


def _facts_of(folder: Path) -> dict[str, Any] | None:
    result, error = read_json(folder / "result.json"), read_json(folder / "error.json")
    if result is None and error is None:
        return None
    state, result = "failed" if result is None else "done", result or {}
    seconds, metrics = result.get("seconds", {}), result.get("metrics", {})
    metrics = metrics | ({"train_seconds": seconds["train"]} if "train" in seconds else {})
    return {
        "state": state,
        "cached": True,
        "metrics": metrics,
        "seconds": seconds,
        "environment": result.get("environment", {}),
        "error": error if state == "failed" else None,
    }


def _fields(value: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}


def _header(outcome: GridOutcome) -> dict[str, Any]:
    return {name: value for name, value in asdict(replace(outcome, records=[])).items() if name != "records"}


def _lasting(event: Any) -> str:
    """What must differ for an event to be a new one. As text: nan is not equal to itself."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: kept(inner) for name, inner in value.items() if name not in RELATIVE}
        return value

    return json.dumps(kept(event), sort_keys=True)
