"""What the engine hands to the tracker, the terminal and the report: one record a trial, one outcome a grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PlannedTrial:
    """One trial of a grid before it runs: what is written down of ``ablations.question.plan.Trial``."""

    key: str  # hash of what determines the result
    arm: str  # name shared by all seeds of one arm, e.g. "grfm" or "mixer=grfm iterations=8"
    values: dict[str, Any]  # axis -> value, e.g. {"model.mixer": "grfm"}
    seed: int
    baseline: bool
    settings: dict[str, Any]
    curves: tuple[str, ...]  # files of its trainings' curves in the runs folder, the last one its own
    model: str  # folder of its saved model in the runs folder
    matched: str | None = None  # what `match` changed, in words

    @classmethod
    def of(cls, trial: Any) -> PlannedTrial:
        """The same of something that has these attributes, a Trial or a TrialRecord."""
        return cls(**{one.name: getattr(trial, one.name) for one in fields(cls)})

    @property
    def label(self) -> str:
        """Name of the trial for people: the arm and its seed."""
        return f"{self.arm}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class TrialRecord(PlannedTrial):
    """One trial of a grid after it ran (or failed, or was found finished).

    ``metrics`` uses the names of the table of measures in docs/results.md; ``folder`` holds settings.json, samples.npz
    and, for gated mixers, gates.json. ``error`` is None or {"cause", "message", "traceback", "log"}.
    """

    state: str  # done | failed
    cached: bool  # finished before this invocation
    metrics: dict[str, float]
    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    error: dict[str, str] | None = None

    @property
    def curve(self) -> Path:
        """The file of its own training's curve."""
        return self.folder.parents[1] / self.curves[-1]


def measures_of(result: Mapping[str, Any]) -> dict[str, float]:
    """A trial's numbers from its result.json, and how long its training took, which is not the same each time."""
    seconds = result.get("seconds", {})
    return result.get("metrics", {}) | ({"train_seconds": seconds["train"]} if "train" in seconds else {})


@dataclass(frozen=True)
class GridOutcome:
    """A grid's question and everything measured to answer it."""

    name: str
    question: str
    claim: str
    match: str  # params | flops | none
    # {"metric": "fid", "better": "lower", "practical": 0.05, "expect": …, "untested": [arms that expect names and are absent]}
    decide: dict[str, Any]
    axes: dict[str, list[Any]]
    records: list[TrialRecord]
    judge: dict[str, Any]  # {"name": "shapes", "sha256": …, plus its record}
    data: dict[str, Any]  # {"name": "shapes", "fingerprint": …, "train": n, …}
    command: str  # what the user typed
    commit: str  # git commit, "+changes" appended when the tree is dirty, or "unknown"
    hardware: dict[str, Any]  # {"cpu": …, "cores": …, "threads": …, "memory_gb": …, "device": …, "torch": …}
    notes: list[str] = field(default_factory=list)  # warnings that belong in the report
    wall_seconds: float = 0.0
    registration: dict[str, Any] | None = None  # see ablations.question.registration.register; None: there is none
