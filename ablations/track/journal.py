"""What MLflow is to know of a grid, on disk: so that it can be told later, or told to another store.

A file a grid, ``runs_dir/tracking/<grid>-<digest of its trials' keys>.jsonl``: the grid and its trials as planned, each
trial as it ended, the grid as it ended. Curves, samples and weights stay in the trials' folders. Only what is new is
appended; of each kind the last line counts. Nothing in it depends on where the runs folder lies.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ablations.answer.records import GridOutcome, TrialRecord
from iris.io.files import read_json
from iris.io.hashing import digest

FOLDER, TRIALS = "tracking", "trials"
FACTS = ("state", "cached", "metrics", "seconds", "environment", "error")
RELATIVE = ("wall_seconds", "cached")  # what is true of one invocation only, and makes no new line


@dataclass(frozen=True)
class PlannedTrial:
    """A trial as ``ablations.question.grid.Trial``, which torch would be imported for."""

    key: str
    arm: str
    values: dict[str, Any]
    seed: int
    baseline: bool
    settings: dict[str, Any]
    matched: str | None = None

    @classmethod
    def of(cls, trial: Any) -> PlannedTrial:
        """The same of something that has these attributes, a Trial or a TrialRecord."""
        return cls(**{name.name: getattr(trial, name.name) for name in fields(cls)})

    @property
    def label(self) -> str:
        """Name of the trial for people: the arm and its seed."""
        return f"{self.arm}, seed {self.seed}"


class Journal:
    """A grid's file. Who writes it, alone, tells MLflow of the grid.

    Args:
        path: of the file.
        runs: the runs folder.
    """

    def __init__(self, path: Path, runs: Path) -> None:
        self.path, self.runs = path, runs
        self.lines: dict[str, dict[str, Any]] = {}  # the last of each kind
        self._lock = FileLock(path.with_suffix(".lock"), thread_local=False)
        self._torn = False  # the file ends in a line that a kill cut off

    @classmethod
    def of(cls, runs: Path, experiment: str, keys: Sequence[str]) -> Journal:
        """The journal of the grid that has these trials."""
        return cls(Path(runs) / FOLDER / f"{experiment}-{digest(sorted(keys))}.jsonl", Path(runs))

    @property
    def key(self) -> str:
        """Names the grid in MLflow."""
        return self.path.stem

    # -- one writer -----------------------------------------------------------------------------------------------

    def acquire(self) -> bool:
        """Become the grid's only writer and read what is there; False while another process is it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        self.read()
        return True

    def release(self) -> None:
        """Let others write."""
        self._lock.release()

    def read(self) -> Journal:
        """Read the file; a line that a kill cut off is no line. Returns itself."""
        text = self.path.read_bytes() if self.path.exists() else b""
        self.lines, self._torn = {}, bool(text) and not text.endswith(b"\n")
        for line in text[: text.rfind(b"\n") + 1].splitlines():
            try:
                event = json.loads(line)
                self.lines[event["kind"]] = event
            except (ValueError, KeyError, TypeError):
                continue
        return self

    def _append(self, kind: str, **facts: Any) -> None:
        event = json.loads(json.dumps({"kind": kind, **facts}, default=str))
        if _lasting(event) == _lasting(self.lines.get(kind)):
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" * self._torn + json.dumps(event) + "\n")
        self.lines[kind], self._torn = event, False

    # -- writing --------------------------------------------------------------------------------------------------

    def plan(self, header: GridOutcome, trials: Sequence[PlannedTrial], params: Mapping[str, str]) -> None:
        """The grid as planned; the header's records are not read."""
        self._append("grid", header=_header(header), params=dict(params), trials=[asdict(trial) for trial in trials])

    def ended(self, record: TrialRecord) -> None:
        """How a trial ended."""
        facts = {name: getattr(record, name) for name in FACTS}
        if record.error and record.error.get("log"):
            facts["error"] = record.error | {"log": _relative(Path(record.error["log"]), self.runs)}
        self._append(f"trial {record.key}", **facts)

    def closed(self, outcome: GridOutcome | None, report: Path | None, status: str, verdict: str | None) -> None:
        """How the grid ended."""
        self._append(
            "end",
            header=outcome and _header(outcome),
            report=report and _relative(report, self.runs),
            status=status,
            verdict=verdict,
        )

    def sent(self, uri: str) -> None:
        """A store has all of it."""
        self._append("sent", uri=uri, of=self._state())

    # -- reading --------------------------------------------------------------------------------------------------

    @property
    def planned(self) -> bool:
        """Whether it says what the grid is."""
        return "grid" in self.lines

    def has_sent(self, uri: str) -> bool:
        """Whether a store was told all of it."""
        sent = self.lines.get("sent", {})
        return sent.get("uri") == uri and sent.get("of") == self._state()

    @property
    def experiment(self) -> str:
        """The grid's name."""
        return self.lines["grid"]["header"]["name"]

    @property
    def params(self) -> dict[str, str]:
        """Of the grid's run."""
        return self.lines["grid"]["params"]

    @property
    def trials(self) -> list[PlannedTrial]:
        """As planned."""
        return [PlannedTrial(**trial) for trial in self.lines["grid"]["trials"]]

    @property
    def end(self) -> dict[str, Any] | None:
        """{"status", "verdict", "report": a folder or None}, or None if the last driver was killed."""
        end = self.lines.get("end")
        return end and {
            "status": end["status"],
            "verdict": end["verdict"],
            "report": None if end["report"] is None else _absolute(end["report"], self.runs),
        }

    def outcome(self) -> GridOutcome:
        """The grid and the trials that ended, with folders as they lie now."""
        header = (self.lines.get("end") or {}).get("header") or self.lines["grid"]["header"]
        return replace(GridOutcome(**header, records=[]), records=[r for t in self.trials if (r := self.record(t))])

    def record(self, trial: PlannedTrial) -> TrialRecord | None:
        """How a trial ended, as written here, or, if the driver did not live to, as its folder says; None: not yet."""
        folder = self.runs / TRIALS / trial.key
        facts = self.lines.get(f"trial {trial.key}")
        if facts is None or (facts["state"] != "done" and (folder / "result.json").exists()):
            facts = _facts_of(folder)
        if facts is None:
            return None
        facts = {name: value for name, value in facts.items() if name != "kind"}
        if facts["error"] and facts["error"].get("log"):
            facts["error"] = facts["error"] | {"log": str(_absolute(facts["error"]["log"], self.runs))}
        return TrialRecord(**asdict(trial), **facts, folder=folder)

    def _state(self) -> str:
        return digest({kind: line for kind, line in self.lines.items() if kind != "sent"})


def journals(runs: Path) -> list[Journal]:
    """Every grid of a runs folder, the oldest first."""
    found = sorted((Path(runs) / FOLDER).glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
    return [Journal(path, Path(runs)).read() for path in found]


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


def _header(outcome: GridOutcome) -> dict[str, Any]:
    return {name: value for name, value in asdict(replace(outcome, records=[])).items() if name != "records"}


def _lasting(event: Any) -> str:
    """What must differ for an event to be a new one. As text: nan is not equal to itself."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: kept(inner) for name, inner in value.items() if name not in RELATIVE}
        return value

    return json.dumps(kept(event), sort_keys=True)


def _relative(path: Path, runs: Path) -> str:
    return os.path.relpath(path, runs)


def _absolute(path: str, runs: Path) -> Path:
    return Path(os.path.normpath(runs / path))
